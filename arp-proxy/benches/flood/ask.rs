//! Asking at fixed times, and noting when answers come.

use std::io::IoSliceMut;
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use arp_proxy::Gateway;
use etherparse::{Icmpv6Type, Ipv6Header, ip_number};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::support::within;

const SECOND: u64 = 1_000_000_000;
/// How long to wait for answers after the last question.
const DRAIN: Duration = Duration::from_secs(1);
/// Room for all that can come while the listener waits for its turn.
const BUFFER: usize = 64 << 20;
const HEADER: usize = 14;

/// What to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// ARP requests.
    Arp,
    /// Neighbour solicitations.
    Neighbour,
}

/// Questions at a fixed rate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flood {
    pub(crate) kind: Kind,
    pub(crate) rate: u32,
    pub(crate) count: u32,
    pub(crate) sources: u32,
}

/// What came of it.
pub(crate) struct Outcome {
    /// Per question: when it was to leave, wall clock.
    intended_ns: Vec<u64>,
    /// Per question: when the first answer came in, 0 if none did.
    arrived_ns: Vec<u64>,
    pub(crate) duplicated: u64,
    /// The latest that a question left.
    pub(crate) late_ns: u64,
    /// From the first question to the last.
    pub(crate) seconds: f64,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Arp => "ARP requests",
            Self::Neighbour => "neighbour solicitations",
        }
    }

    /// Question `number`: the number is the asker's IP address, so that the answer has it too.
    fn question(self, number: u32, source: u32) -> Vec<u8> {
        let [high, low] = u16::try_from(source).unwrap().to_be_bytes();
        let mac = [0x02, 0, 0, 0, high, low];
        let (destination, ethertype, payload) = match self {
            Self::Arp => ([0xff; 6], [0x08, 0x06], arp(mac, number)),
            Self::Neighbour => (
                [0x33, 0x33, 0xff, 0, 0, 1],
                [0x86, 0xdd],
                solicitation(mac, number),
            ),
        };
        [&destination[..], &mac, &ethertype, &payload].concat()
    }

    /// Which question a frame answers, if it is an answer.
    fn answered(self, frame: &[u8]) -> Option<u32> {
        let payload = frame.get(HEADER..)?;
        let number = match (self, frame.get(12..HEADER)?) {
            // A reply's target; the 10 in front is the network's.
            (Self::Arp, [0x08, 0x06]) if payload.get(6..8)? == [0, 2] => payload.get(24..28)?,
            (Self::Neighbour, [0x86, 0xdd]) if payload.get(40)? == &136 => payload.get(36..40)?,
            _ => return None,
        };
        Some(u32::from_be_bytes(number.try_into().ok()?) & 0x00ff_ffff)
    }
}

fn arp(mac: [u8; 6], number: u32) -> Vec<u8> {
    let [_, a, b, c] = number.to_be_bytes();
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(mac);
    packet.extend([10, a, b, c]);
    packet.extend([0; 6]);
    packet.extend(Gateway::DEFAULT_IPV4.octets());
    packet
}

fn solicitation(mac: [u8; 6], number: u32) -> Vec<u8> {
    let source = Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(number)).octets();
    let group: Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
    let mut body = Gateway::DEFAULT_IPV6.octets().to_vec();
    body.extend([1, 1]);
    body.extend(mac);
    let kind = Icmpv6Type::NeighborSolicitation;
    let icmp = kind.to_header(source, group.octets(), &body).unwrap();
    let header = Ipv6Header {
        payload_length: u16::try_from(icmp.header_len() + body.len()).unwrap(),
        next_header: ip_number::IPV6_ICMP,
        hop_limit: 255,
        source,
        destination: group.octets(),
        ..Ipv6Header::default()
    };
    [&header.to_bytes()[..], &icmp.to_bytes(), &body].concat()
}

impl Flood {
    pub(crate) fn run(self, namespace: &str, interface: &str) -> Outcome {
        assert!(
            self.count < 1 << 24,
            "more than the numbers in an answer can tell"
        );
        let socket = within(namespace, || open(interface));
        let questions: Vec<Vec<u8>> = (0..self.count)
            .map(|number| self.kind.question(number, number % self.sources))
            .collect();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let listening = scope.spawn(|| self.listen(&socket, &stop));
            let (intended_ns, late_ns) = self.ask(&socket, &questions);
            thread::sleep(DRAIN);
            stop.store(true, Ordering::Relaxed);
            let (arrived_ns, duplicated) = listening.join().unwrap();
            Outcome {
                intended_ns,
                arrived_ns,
                duplicated,
                late_ns,
                seconds: f64::from(self.count) / f64::from(self.rate),
            }
        })
    }

    fn ask(self, socket: &Socket, questions: &[Vec<u8>]) -> (Vec<u64>, u64) {
        be_prompt();
        let start = now_ns() + SECOND / 10;
        let mut late_ns = 0;
        let intended = questions.iter().zip(0_u64..).map(|(question, number)| {
            let due = start + number * SECOND / u64::from(self.rate);
            sleep_until(due);
            socket.send(question).unwrap();
            late_ns = late_ns.max(now_ns().saturating_sub(due));
            due
        });
        (intended.collect(), late_ns)
    }

    fn listen(self, socket: &Socket, stop: &AtomicBool) -> (Vec<u64>, u64) {
        let mut arrived_ns = vec![0; self.count as usize];
        let mut duplicated = 0;
        while !stop.load(Ordering::Relaxed) {
            let Some((number, stamp)) = receive(socket.as_raw_fd(), self.kind) else {
                continue;
            };
            match arrived_ns.get_mut(number as usize) {
                Some(place @ 0) => *place = stamp,
                Some(_) => duplicated += 1,
                None => panic!("an answer to question {number}, which was not asked"),
            }
        }
        (arrived_ns, duplicated)
    }
}

impl Outcome {
    pub(crate) fn asked(&self) -> u64 {
        self.intended_ns.len() as u64
    }

    pub(crate) fn lost(&self) -> u64 {
        self.arrived_ns
            .iter()
            .filter(|&&arrived| arrived == 0)
            .count() as u64
    }

    pub(crate) fn latencies(&self) -> impl Iterator<Item = u64> {
        let pairs = self.arrived_ns.iter().zip(&self.intended_ns);
        pairs
            .filter(|(arrived, _)| **arrived != 0)
            .map(|(arrived, intended)| arrived.saturating_sub(*intended))
    }
}

/// The next answer and when the kernel received it; none if nothing came for a while, or something else.
fn receive(socket: RawFd, kind: Kind) -> Option<(u32, u64)> {
    let mut frame = [0; 256];
    let mut control = nix::cmsg_space!(TimeSpec);
    let mut vector = [IoSliceMut::new(&mut frame)];
    let received = recvmsg::<()>(socket, &mut vector, Some(&mut control), MsgFlags::empty());
    let message = match received {
        Ok(message) => message,
        Err(Errno::EAGAIN | Errno::EINTR) => return None,
        Err(error) => panic!("cannot receive: {error}"),
    };
    let stamp = message.cmsgs().unwrap().find_map(|told| match told {
        ControlMessageOwned::ScmTimestampns(stamp) => Some(nanos(stamp)),
        _ => None,
    })?;
    let length = message.bytes;
    Some((kind.answered(frame.get(..length)?)?, stamp))
}

fn open(interface: &str) -> Socket {
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).unwrap();
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true).unwrap();
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    let index = nix::net::if_::if_nametoindex(interface).unwrap();
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is one of the platform's sockaddr types, and fits.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    address.sll_ifindex = i32::try_from(index).unwrap();
    let length = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the storage holds a sockaddr_ll of that length.
    socket
        .bind(&unsafe { SockAddr::new(storage, length) })
        .unwrap();
    socket
}

/// Timers of ordinary threads may be 50 µs late to be coalesced, half a period; and the sender is the measure, so it
/// goes before whatever else wants its core.
fn be_prompt() {
    // SAFETY: plain integers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64) };
    go_first(true);
}

/// Gives this thread, and what it starts, real-time priority, or takes it away.
pub(crate) fn go_first(first: bool) {
    let (policy, sched_priority) = if first {
        (libc::SCHED_FIFO, 1)
    } else {
        (libc::SCHED_OTHER, 0)
    };
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: 0 is the calling thread; `parameters` outlives the call.
    let set = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    assert_eq!(set, 0, "real-time priority takes CAP_SYS_NICE");
}

fn sleep_until(due_ns: u64) {
    let due = TimeSpec::new(
        i64::try_from(due_ns / SECOND).unwrap(),
        i64::try_from(due_ns % SECOND).unwrap(),
    );
    let flags = ClockNanosleepFlags::TIMER_ABSTIME;
    while clock_nanosleep(ClockId::CLOCK_REALTIME, flags, &due) == Err(Errno::EINTR) {}
}

fn now_ns() -> u64 {
    nanos(clock_gettime(ClockId::CLOCK_REALTIME).unwrap())
}

fn nanos(time: TimeSpec) -> u64 {
    let seconds = u64::try_from(time.tv_sec()).unwrap();
    seconds * SECOND + u64::try_from(time.tv_nsec()).unwrap()
}
