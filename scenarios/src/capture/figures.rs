//! From captured frames to figures.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use dataplane_probe::wire::{Body, Data, Packet, Received};

use super::frame::{Carries, Frame, Segment};

/// What the capture of one migration says. Gaps and stalls are less one period, as in reports.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    /// Time between two packets.
    pub period_ms: f64,
    /// When the first packet to the VM was sent, in nanoseconds of Unix time.
    pub started_ns: u64,
    /// Around the pause: the VM sent none of the probe's packets.
    pub silence: Option<Silence>,
    /// Packets towards the VM.
    pub to_vm: Direction,
    /// Packets from the VM.
    pub from_vm: Direction,
    /// The longest time without arrivals at the client from the VM.
    pub longest_gap: Option<Span>,
    /// The long TCP stream.
    pub stream: Option<Stream>,
}

/// What happened to the packets of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    /// Different packets sent.
    pub sent: u64,
    /// Different packets received. Towards the VM, the count in its newest packet, and of those sent
    /// after that was counted, the ones that its tap shows.
    pub received: u64,
    /// Packets sent and not received.
    pub lost: u64,
    /// Copies beyond the first. Towards the VM, those on its tap where it ran.
    pub duplicated: u64,
    /// Where they passed.
    pub places: Places,
}

/// On which node's tap packets were seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The source's alone.
    pub source: u64,
    /// The target's alone.
    pub target: u64,
    /// Both.
    pub both: u64,
    /// Neither.
    pub neither: u64,
}

/// A stretch of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// Its length, less one period where that is its rhythm.
    pub ms: f64,
    /// When it began, in nanoseconds of Unix time.
    pub start_ns: u64,
    /// When it ended.
    pub end_ns: u64,
}

/// When the VM sent nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Silence {
    /// From its last packet to its next.
    pub span: Span,
    /// The next was on the target's tap. If not, this is its longest silence on the source's.
    pub moved: bool,
}

/// The long TCP stream: the connection to which the client sent most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stream {
    /// The client's port.
    pub port: u16,
    /// Time between two records.
    pub period_ms: f64,
    /// The longest time without new data from the VM.
    pub longest_stall: Option<Span>,
    /// The longest that the silence lies in or touches.
    pub stall_around_silence: Option<Span>,
}

/// What one file has of the probe's session.
#[derive(Debug, Default)]
struct Place {
    to_vm: Copies,
    from_vm: Copies,
    /// What had reached the VM, by its newest packet here, and that packet's sequence number.
    told: Option<(u64, Received)>,
}

/// When copies of packets passed, by sequence number.
type Copies = BTreeMap<u64, Vec<u64>>;

impl Figures {
    pub(super) fn recompute(client: &[Frame], source: &[Frame], target: &[Frame]) -> Result<Self> {
        let session = busiest_session(client)
            .context("the client's capture has no packet of the probe to the VM")?;
        let period_ns = period_ns(client, session)
            .context("the client's capture has one packet of the probe only")?;
        let stream = Connection::busiest(client);
        let [client, source, target] =
            [client, source, target].map(|frames| Place::of(frames, session));
        let sent = client.to_vm.values().flatten();
        let silence = Silence::of(&source, &target);
        Ok(Self {
            period_ms: millis(period_ns),
            started_ns: *sent.min().context("no packet was sent")?,
            silence,
            to_vm: to_vm(&client, &source, &target, silence)?,
            from_vm: from_vm(&client, &source, &target),
            longest_gap: {
                let mut arrivals: Vec<_> = client
                    .from_vm
                    .values()
                    .filter_map(|copies| copies.first().copied())
                    .collect();
                arrivals.sort_unstable();
                gaps(&arrivals, period_ns).max_by(by_length)
            },
            stream: stream.map(|stream| stream.figures(silence)),
        })
    }
}

/// The packets to the VM, with their sessions.
fn to_vm_of(frames: &[Frame]) -> impl Iterator<Item = (u64, Data)> {
    frames.iter().filter_map(|frame| match frame.carries {
        Carries::Packet(Packet {
            session,
            body: Body::ToVm(data),
        }) => Some((session, data)),
        _ => None,
    })
}

/// The session with the most packets to the VM: other flows have lower rates.
fn busiest_session(client: &[Frame]) -> Option<u64> {
    let mut packets = BTreeMap::new();
    for (session, _) in to_vm_of(client) {
        *packets.entry(session).or_insert(0_u64) += 1;
    }
    let busiest = packets.into_iter().max_by_key(|(_, count)| *count);
    busiest.map(|(session, _)| session)
}

/// From when the client meant to send its first and its last packet.
fn period_ns(client: &[Frame], session: u64) -> Option<u64> {
    let of_session = to_vm_of(client).filter(|(of, _)| *of == session);
    let mut sent: Vec<_> = of_session.map(|(_, data)| data).collect();
    sent.sort_by_key(|data| data.sequence);
    let (first, last) = (sent.first()?, sent.last()?);
    let time = last.intended_ns.checked_sub(first.intended_ns)?;
    time.checked_div(last.sequence - first.sequence)
}

impl Place {
    fn of(frames: &[Frame], session: u64) -> Self {
        let mut place = Self::default();
        for frame in frames {
            let Carries::Packet(packet) = frame.carries else {
                continue;
            };
            // At another interface of the host it goes the other way.
            let passes = frame.leaves.is_none_or(|leaves| leaves == frame.to_vm);
            if packet.session != session || !passes {
                continue;
            }
            let (copies, data) = match packet.body {
                Body::ToVm(data) if frame.to_vm => (&mut place.to_vm, data),
                Body::FromVm(data, received) if !frame.to_vm => {
                    let newest = place.told.is_none_or(|(told, _)| told < data.sequence);
                    if newest && received.count > 0 {
                        place.told = Some((data.sequence, received));
                    }
                    (&mut place.from_vm, data)
                }
                _ => continue,
            };
            copies.entry(data.sequence).or_default().push(frame.at_ns);
        }
        place
    }
}

impl Silence {
    fn of(source: &Place, target: &Place) -> Option<Self> {
        let sent = |place: &Place| {
            let mut times: Vec<_> = place.from_vm.values().flatten().copied().collect();
            times.sort_unstable();
            times
        };
        let before = sent(source);
        let Some(&until_ns) = sent(target).first() else {
            let span = gaps(&before, 0).max_by(by_length)?;
            return Some(Self { span, moved: false });
        };
        let last = before.into_iter().rfind(|at| *at <= until_ns)?;
        Some(Self {
            span: Span::between(last, until_ns, 0),
            moved: true,
        })
    }
}

fn to_vm(
    client: &Place,
    source: &Place,
    target: &Place,
    silence: Option<Silence>,
) -> Result<Direction> {
    let told = [client, source, target]
        .into_iter()
        .filter_map(|place| place.told);
    let (_, told) = told
        .max_by_key(|(sequence, _)| *sequence)
        .context("no packet from the VM says what has reached it")?;
    // What the guest can read of its taps: the source's until it paused, the target's if it resumed
    // there.
    let moved = silence.filter(|silence| silence.moved);
    let copies = |sequence: u64| {
        let at = |place: &Place| place.to_vm.get(&sequence).cloned().unwrap_or_default();
        let left_ns = moved.map_or(u64::MAX, |silence| silence.span.start_ns);
        let on_source = at(source).into_iter().filter(|at| *at <= left_ns).count();
        let on_target = moved.map_or(0, |_| at(target).len());
        on_source + on_target
    };
    let sequences = || client.to_vm.keys().copied();
    let sent = client.to_vm.len() as u64;
    let tail = sequences().filter(|sequence| *sequence > told.highest);
    let received = told.count + tail.filter(|sequence| copies(*sequence) > 0).count() as u64;
    ensure!(
        received <= sent,
        "the VM received {received} packets of {sent} that the client sent: the capture began late"
    );
    let extra = |sequence| copies(sequence).saturating_sub(1) as u64;
    Ok(Direction {
        sent,
        received,
        lost: sent - received,
        duplicated: sequences().map(extra).sum(),
        places: Places::of(sequences(), &source.to_vm, &target.to_vm),
    })
}

fn from_vm(client: &Place, source: &Place, target: &Place) -> Direction {
    let mut sequences: Vec<_> = [client, source, target]
        .iter()
        .flat_map(|place| place.from_vm.keys().copied())
        .collect();
    sequences.sort_unstable();
    sequences.dedup();
    let (sent, received) = (sequences.len() as u64, client.from_vm.len() as u64);
    let extra = |copies: &Vec<u64>| copies.len().saturating_sub(1) as u64;
    Direction {
        sent,
        received,
        lost: sent - received,
        duplicated: client.from_vm.values().map(extra).sum(),
        places: Places::of(sequences.into_iter(), &source.from_vm, &target.from_vm),
    }
}

impl Places {
    fn of(sequences: impl Iterator<Item = u64>, source: &Copies, target: &Copies) -> Self {
        let mut places = Self::default();
        for sequence in sequences {
            let on = (
                source.contains_key(&sequence),
                target.contains_key(&sequence),
            );
            *match on {
                (true, false) => &mut places.source,
                (false, true) => &mut places.target,
                (true, true) => &mut places.both,
                (false, false) => &mut places.neither,
            } += 1;
        }
        places
    }
}

/// A TCP connection as the client saw it.
#[derive(Debug, Default)]
struct Connection {
    port: u16,
    /// Bytes of payload to the VM, those sent again included.
    bytes_to_vm: u64,
    /// When payload went there.
    sent_ns: Vec<u64>,
    /// What came from the VM.
    arrived: Vec<(u64, Segment)>,
}

impl Connection {
    fn busiest(client: &[Frame]) -> Option<Self> {
        let mut connections = BTreeMap::<u16, Self>::new();
        for frame in client {
            let Carries::Segment(segment) = frame.carries else {
                continue;
            };
            let connection = connections.entry(segment.peer_port).or_default();
            connection.port = segment.peer_port;
            if !frame.to_vm {
                connection.arrived.push((frame.at_ns, segment));
            } else if segment.length > 0 {
                connection.bytes_to_vm += u64::from(segment.length);
                connection.sent_ns.push(frame.at_ns);
            }
        }
        connections
            .into_values()
            .max_by_key(|connection| connection.bytes_to_vm)
    }

    fn figures(&self, silence: Option<Silence>) -> Stream {
        let period_ns = self.period_ns();
        let arrivals = self.new_data();
        let touches = |gap: &Span| {
            silence.is_some_and(|Silence { span, .. }| {
                gap.start_ns <= span.end_ns && gap.end_ns >= span.start_ns
            })
        };
        Stream {
            port: self.port,
            period_ms: millis(period_ns),
            longest_stall: gaps(&arrivals, period_ns).max_by(by_length),
            stall_around_silence: gaps(&arrivals, period_ns).filter(touches).max_by(by_length),
        }
    }

    /// Most records are sent on time, each in a segment: the median time between two.
    fn period_ns(&self) -> u64 {
        let mut between: Vec<_> = self
            .sent_ns
            .iter()
            .zip(self.sent_ns.iter().skip(1))
            .map(|(before, after)| after.saturating_sub(*before))
            .collect();
        between.sort_unstable();
        between.get(between.len() / 2).copied().unwrap_or(0)
    }

    /// When there was more for the client to read: what comes before its turn waits, what comes
    /// again adds nothing.
    fn new_data(&self) -> Vec<u64> {
        let Some((_, first)) = self.arrived.first() else {
            return Vec::new();
        };
        let base = first.sequence.wrapping_add(u32::from(first.opens));
        let mut read = 0_u64;
        let mut waiting = BTreeMap::<u64, u64>::new();
        let mut times = Vec::new();
        for (at_ns, segment) in &self.arrived {
            let start = segment.sequence.wrapping_sub(base);
            // Before the first: it came again.
            if segment.length == 0 || start > u32::MAX / 2 {
                continue;
            }
            let start = u64::from(start);
            let end = start + u64::from(segment.length);
            let farthest = waiting.entry(start).or_default();
            *farthest = end.max(*farthest);
            let before = read;
            while let Some(next) = waiting.first_entry().filter(|next| *next.key() <= read) {
                read = read.max(next.remove());
            }
            if read > before {
                times.push(*at_ns);
            }
        }
        times
    }
}

impl Span {
    fn between(start_ns: u64, end_ns: u64, period_ns: u64) -> Self {
        Self {
            ms: millis(end_ns.saturating_sub(start_ns).saturating_sub(period_ns)),
            start_ns,
            end_ns,
        }
    }
}

/// The times between one moment and the next, less one period.
fn gaps(times: &[u64], period_ns: u64) -> impl Iterator<Item = Span> {
    let pairs = times.iter().zip(times.iter().skip(1));
    pairs.map(move |(start, end)| Span::between(*start, *end, period_ns))
}

fn by_length(one: &Span, other: &Span) -> std::cmp::Ordering {
    one.ms.total_cmp(&other.ms)
}

#[allow(
    clippy::cast_precision_loss,
    reason = "durations of a migration are far below 2^52 ns"
)]
fn millis(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}
