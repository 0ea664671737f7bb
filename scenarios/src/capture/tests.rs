//! Captures made by hand: a VM that moves after 40 ms and is silent for 20.

use std::collections::BTreeSet;

use dataplane_probe::wire::{Body, Data, MIN_PACKET, Packet, Received};
use tempfile::TempDir;

use super::*;

const US: u64 = 1_000;
const MS: u64 = 1_000 * US;
/// Nanoseconds of Unix time.
const START: u64 = 1_700_000_000_000_000_000;
const SESSION: u64 = 7;
const STREAM: u16 = 40_000;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// A capture file of all interfaces, or of one.
struct File {
    link: Link,
    frames: Vec<(u64, Vec<u8>)>,
}

/// A migration's three files.
struct Files {
    client: File,
    source: File,
    target: File,
}

/// What of a migration does not go well; everything else does.
#[derive(Default)]
struct Faults {
    to_vm: Fault,
    from_vm: Fault,
}

/// Which packets of one direction something happens to.
#[derive(Default)]
struct Fault {
    /// Towards the VM they reach only the source, where it is not any more; from it they are on its
    /// tap and do not arrive.
    lost: BTreeSet<u64>,
    /// They come twice.
    twice: BTreeSet<u64>,
}

impl File {
    fn new(link: Link) -> Self {
        Self {
            link,
            frames: Vec::new(),
        }
    }

    /// A frame of the VM or to it, at a time from [`START`]; `leaves` the host or comes in.
    fn frame(&mut self, at_ns: u64, leaves: bool, packet: Vec<u8>) {
        let mut bytes = match self.link {
            Link::Ethernet => vec![0; 12],
            Link::Sll2 => Vec::new(),
        };
        let ethertype: u16 = if packet[0] >> 4 == 4 { 0x0800 } else { 0x86dd };
        bytes.extend(ethertype.to_be_bytes());
        if self.link == Link::Sll2 {
            bytes.extend([0; 8]);
            bytes.push(if leaves { 4 } else { 3 });
            bytes.extend([0; 9]);
        }
        bytes.extend(packet);
        self.frames.push((START + at_ns, bytes));
    }

    fn bytes(&self) -> Vec<u8> {
        let link = match self.link {
            Link::Ethernet => 1,
            Link::Sll2 => 276,
        };
        let words = [0xa1b2_3c4d, 0x0004_0002, 0, 0, 192, link];
        let mut file: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        let mut frames = self.frames.clone();
        frames.sort_by_key(|(at_ns, _)| *at_ns);
        for (at_ns, bytes) in frames {
            let length = bytes.len() as u64;
            for word in [
                at_ns / 1_000_000_000,
                at_ns % 1_000_000_000,
                length.min(192),
                length,
            ] {
                file.extend(u32::try_from(word).unwrap().to_le_bytes());
            }
            file.extend(&bytes[..bytes.len().min(192)]);
        }
        file
    }
}

fn ip(protocol: u8, payload: &[u8], v6: bool) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    let mut packet = if v6 {
        let mut header = vec![0; 40];
        header[0] = 0x60;
        header[4..6].copy_from_slice(&length.to_be_bytes());
        header[6] = protocol;
        header
    } else {
        let mut header = vec![0; 20];
        header[0] = 0x45;
        header[2..4].copy_from_slice(&(20 + length).to_be_bytes());
        header[9] = protocol;
        header
    };
    packet.extend(payload);
    packet
}

fn ports(to_vm: bool, peer: u16) -> Vec<u8> {
    let (source, destination) = if to_vm { (peer, 7_000) } else { (7_000, peer) };
    [source, destination]
        .into_iter()
        .flat_map(u16::to_be_bytes)
        .collect()
}

fn udp(to_vm: bool, session: u64, body: Body, v6: bool) -> Vec<u8> {
    let mut payload = [0; MIN_PACKET];
    Packet { session, body }.encode(&mut payload);
    let mut datagram = ports(to_vm, 39_999);
    datagram.extend([0; 4]);
    datagram.extend(payload);
    ip(17, &datagram, v6)
}

fn tcp(to_vm: bool, peer: u16, sequence: u32, flags: u8, length: usize) -> Vec<u8> {
    let mut segment = ports(to_vm, peer);
    segment.extend(sequence.to_be_bytes());
    segment.extend([0; 4]);
    segment.extend([5 << 4, flags]);
    segment.extend([0; 6]);
    segment.resize(20 + length, 0);
    ip(6, &segment, false)
}

fn data(sequence: u64) -> Data {
    Data {
        sequence,
        intended_ns: 5_000 + sequence * MS,
        late_us: 0,
    }
}

impl Files {
    /// 100 packets each way at 1 kHz. The VM runs on the source until 40 ms, on the target from 60
    /// ms.
    fn migration(link: Link, v6: bool, faults: &Faults) -> Self {
        let [client, source, target] = [link; 3].map(File::new);
        let mut files = Self {
            client,
            source,
            target,
        };
        for sequence in 0..100 {
            let at = sequence * MS;
            let packet = || udp(true, SESSION, Body::ToVm(data(sequence)), v6);
            files.client.frame(at, true, packet());
            let lost = faults.to_vm.lost.contains(&sequence);
            let tap = if lost || sequence < 40 {
                &mut files.source
            } else {
                &mut files.target
            };
            let copies = if faults.to_vm.twice.contains(&sequence) {
                2
            } else {
                1
            };
            for copy in 0..copies {
                tap.frame(at + (100 + copy) * US, true, packet());
            }
        }
        let has_reached = |sequence: &u64| !faults.to_vm.lost.contains(sequence);
        for sequence in 0..100 {
            let at = sequence * MS + if sequence < 40 { 0 } else { 20 * MS };
            // What came within the last millisecond it has not read yet.
            let highest = (at / MS).clamp(1, 98) - 1;
            let received = Received {
                count: (0..=highest).filter(has_reached).count() as u64,
                highest,
                ..Received::default()
            };
            let packet = || udp(false, SESSION, Body::FromVm(data(sequence), received), v6);
            let tap = if sequence < 40 {
                &mut files.source
            } else {
                &mut files.target
            };
            tap.frame(at, false, packet());
            if faults.from_vm.lost.contains(&sequence) {
                continue;
            }
            files.client.frame(at + 200 * US, false, packet());
            if faults.from_vm.twice.contains(&sequence) {
                files.client.frame(at + 250 * US, false, packet());
            }
        }
        files
    }

    /// A stream with a record every 10 ms, each of 64 bytes. Its echo takes a millisecond; where
    /// the VM is silent the first record is lost and comes after the others, and from 110 to 190 ms
    /// nothing comes.
    fn with_stream(mut self) -> Self {
        let isn = u32::MAX - 100;
        let sequence = |record: u32| isn.wrapping_add(1 + record * 64);
        let syn_ack = tcp(false, STREAM, isn, SYN | ACK, 0);
        self.client.frame(0, false, syn_ack);
        for record in 0..20 {
            let sent = 5 * MS + u64::from(record) * 10 * MS;
            self.client
                .frame(sent, true, tcp(true, STREAM, record * 64, ACK, 64));
            let echoed = match record {
                4 => 80 * MS,
                5..7 => 75 * MS,
                11..18 => 190 * MS,
                _ => sent + MS,
            };
            self.client
                .frame(echoed, false, tcp(false, STREAM, sequence(record), ACK, 64));
            // One that came already, and a connection of its own.
            self.client
                .frame(echoed + MS, false, tcp(false, STREAM, sequence(0), ACK, 64));
            let other = STREAM + 1 + u16::try_from(record).unwrap();
            self.client.frame(sent, true, tcp(true, other, 0, ACK, 16));
            self.client
                .frame(sent + MS, false, tcp(false, other, 0, ACK, 900));
        }
        self
    }

    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (file, name) in [&self.client, &self.source, &self.target]
            .into_iter()
            .zip(FILES)
        {
            fs::write(dir.path().join(name), file.bytes()).unwrap();
        }
        dir
    }

    fn figures(&self) -> Figures {
        Figures::of(self.write().path()).unwrap()
    }
}

fn assert_ms(span: Option<Span>, ms: f64, from_us: u64) {
    let span = span.expect("there is one");
    assert!((span.ms - ms).abs() < 1e-6, "{span:?}");
    assert_eq!(span.start_ns, START + from_us * US, "{span:?}");
}

#[test]
fn a_migration_without_faults_has_a_gap_and_nothing_else() {
    for link in [Link::Sll2, Link::Ethernet] {
        for v6 in [false, true] {
            let figures = Files::migration(link, v6, &Faults::default()).figures();
            let expected = |source, target| Direction {
                sent: 100,
                received: 100,
                places: Places {
                    source,
                    target,
                    ..Places::default()
                },
                ..Direction::default()
            };
            assert_eq!(figures.to_vm, expected(40, 60));
            assert_eq!(figures.from_vm, expected(40, 60));
            assert!((figures.period_ms - 1.0).abs() < 1e-6);
            assert_eq!(figures.started_ns, START);
            assert_ms(figures.longest_gap, 20.0, 39_200);
            let silence = figures.silence.unwrap();
            assert!(silence.moved);
            assert_ms(Some(silence.span), 21.0, 39_000);
            assert_eq!(figures.stream, None);
        }
    }
}

#[test]
fn losses_and_duplicates_are_counted_each_way_and_where_they_were() {
    let faults = Faults {
        to_vm: Fault {
            lost: (40..43).collect(),
            twice: [10, 99].into(),
        },
        from_vm: Fault {
            lost: [55].into(),
            twice: [50].into(),
        },
    };
    let figures = Files::migration(Link::Sll2, false, &faults).figures();
    // Of the last two the VM has not told; they were on its tap.
    assert_eq!(
        figures.to_vm,
        Direction {
            sent: 100,
            received: 97,
            lost: 3,
            duplicated: 2,
            places: Places {
                source: 43,
                target: 57,
                ..Places::default()
            },
        }
    );
    assert_eq!(
        figures.from_vm,
        Direction {
            sent: 100,
            received: 99,
            lost: 1,
            duplicated: 1,
            places: Places {
                source: 40,
                target: 60,
                ..Places::default()
            },
        }
    );
}

#[test]
fn the_last_packets_are_lost_where_no_tap_shows_them() {
    let mut files = Files::migration(Link::Sll2, false, &Faults::default());
    files.target.frames.retain(|(at_ns, bytes)| {
        let leaves = bytes[10] == 4;
        !(leaves && *at_ns > START + 98 * MS)
    });
    let figures = files.figures();
    assert_eq!((figures.to_vm.received, figures.to_vm.lost), (98, 2));
    assert_eq!(figures.to_vm.places.neither, 2);
}

#[test]
fn a_copy_for_a_guest_that_has_left_is_no_duplicate() {
    let mut files = Files::migration(Link::Sll2, false, &Faults::default());
    for sequence in 30..80 {
        let packet = udp(true, SESSION, Body::ToVm(data(sequence)), false);
        files
            .source
            .frame(sequence * MS + 300 * US, true, packet.clone());
        // Nor what passes another interface of the host on its way.
        files.target.frame(sequence * MS, false, packet);
    }
    let figures = files.figures();
    // Only those that came to the source's tap twice while the guest was there.
    assert_eq!(figures.to_vm.duplicated, 9);
    assert_eq!(figures.to_vm.places.both, 40);
}

#[test]
fn a_vm_that_stays_is_silent_on_the_source() {
    let mut files = Files::migration(Link::Sll2, false, &Faults::default());
    files.source.frames.append(&mut files.target.frames);
    let figures = files.figures();
    let silence = figures.silence.unwrap();
    assert!(!silence.moved);
    assert_ms(Some(silence.span), 21.0, 39_000);
    assert_eq!((figures.to_vm.lost, figures.to_vm.places.source), (0, 100));
}

#[test]
fn other_sessions_are_other_flows() {
    let mut files = Files::migration(Link::Sll2, false, &Faults::default());
    for sequence in 0..10 {
        let packet = udp(true, SESSION + 1, Body::ToVm(data(sequence * 10)), false);
        files.client.frame(sequence * 10 * MS, true, packet.clone());
        files.source.frame(sequence * 10 * MS, true, packet);
    }
    let figures = files.figures();
    assert_eq!((figures.to_vm.sent, figures.to_vm.duplicated), (100, 0));
}

#[test]
fn a_stall_lasts_until_the_client_can_read_on() {
    let stream = Files::migration(Link::Sll2, false, &Faults::default())
        .with_stream()
        .figures()
        .stream
        .unwrap();
    assert_eq!(stream.port, STREAM);
    assert!((stream.period_ms - 10.0).abs() < 1e-6);
    assert_ms(stream.stall_around_silence, 80.0 - 36.0 - 10.0, 36_000);
    assert_ms(stream.longest_stall, 190.0 - 106.0 - 10.0, 106_000);
}

#[test]
fn captures_and_reports_agree_within_a_packet_and_a_period() {
    let figures = Files::migration(Link::Sll2, false, &Faults::default())
        .with_stream()
        .figures();
    let reported = Reported {
        sent_to_vm: 100,
        lost_to_vm: 1,
        received_from_vm: 99,
        longest_gap_from_vm_ms: Some(20.9),
        longest_stall_ms: Some(65.0),
        ..Reported::default()
    };
    let disagree = |reported: &Reported| -> Vec<_> {
        let compared = compare(&figures, reported).into_iter();
        compared
            .filter(|it| !it.agrees())
            .map(|it| it.what)
            .collect()
    };
    assert_eq!(compare(&figures, &reported).len(), 8);
    assert_eq!(disagree(&reported), [""; 0]);
    for (changed, what) in [
        (
            Reported {
                lost_to_vm: 2,
                ..reported
            },
            "lost towards it",
        ),
        (
            Reported {
                duplicated_from_vm: 2,
                ..reported
            },
            "from it that arrived twice",
        ),
        (
            Reported {
                longest_gap_from_vm_ms: Some(18.9),
                ..reported
            },
            "gap",
        ),
        (
            Reported {
                longest_stall_ms: Some(63.9),
                ..reported
            },
            "longest stall",
        ),
    ] {
        let found = disagree(&changed);
        assert!(
            matches!(found.as_slice(), [one] if one.contains(what)),
            "{found:?}"
        );
    }
    let without_stream = Figures {
        stream: None,
        ..figures.clone()
    };
    let stall = compare(&without_stream, &reported);
    assert!(stall.iter().any(|it| it.captured.is_none() && !it.agrees()));
}

#[test]
fn a_table_has_every_figure() {
    let mut faults = Faults::default();
    faults.to_vm.lost = (40..43).collect();
    let migration = Files::migration(Link::Sll2, false, &faults).with_stream();
    let text = render(&migration.figures());
    let words: Vec<_> = text.split_whitespace().collect();
    let text = words.join(" ");
    for row in [
        " lost 3 0 ",
        "Longest gap in arrivals from the VM: 20.0 ms at +0.039 s",
        "last packet on the source at +0.039 s, its next on the target 21.0 ms later",
        "client's port 40000, a record every 10.0 ms",
        "longest stall: 74.0 ms at +0.106 s; around the silence: 34.0 ms at +0.036 s",
    ] {
        assert!(text.contains(row), "{row}\n{text}");
    }
}

#[test]
fn errors_name_the_file_and_the_place() {
    let error = |change: &dyn Fn(&Path)| {
        let dir = Files::migration(Link::Sll2, false, &Faults::default()).write();
        change(dir.path());
        format!("{:#}", Figures::of(dir.path()).unwrap_err())
    };
    let missing = error(&|dir| fs::remove_file(dir.join("target.pcap")).unwrap());
    assert!(missing.contains("target.pcap"), "{missing}");

    let cut_off = error(&|dir| {
        let path = dir.join("source.pcap");
        let bytes = fs::read(&path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
    });
    assert!(
        cut_off.contains("source.pcap") && cut_off.contains("record 80 at byte"),
        "{cut_off}"
    );

    let silent = error(&|dir| {
        fs::write(dir.join("client.pcap"), File::new(Link::Sll2).bytes()).unwrap();
    });
    assert!(silent.contains("no packet of the probe"), "{silent}");
}

#[test]
fn a_snapshot_that_is_too_short_is_an_error_and_other_traffic_is_not() {
    let probe = udp(true, SESSION, Body::ToVm(data(1)), false);
    let mut file = File::new(Link::Ethernet);
    file.frame(0, true, probe);
    let (_, frame) = file.frames.remove(0);
    let record = |bytes, cut| Record {
        number: 3,
        at_ns: 0,
        bytes,
        cut,
    };
    let of = |bytes, cut| Frame::of(Link::Ethernet, &record(bytes, cut));
    assert!(matches!(of(&frame, false), Ok(Some(_))));
    for length in 0..frame.len() {
        let bytes = &frame[..length];
        // The last bytes of such a packet are padding.
        if length < 14 + 20 + 8 + 40 {
            assert_eq!(of(bytes, true), Err(TooShort(3)), "{length}");
        }
        assert!(of(bytes, false).is_ok(), "{length}");
    }
    let mut arp = frame.clone();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_eq!(of(&arp, true), Ok(None));
    let mut other_port = frame.clone();
    other_port[36..38].copy_from_slice(&[0, 53]);
    assert_eq!(of(&other_port, false), Ok(None));
}
