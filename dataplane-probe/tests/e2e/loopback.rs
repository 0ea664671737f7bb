//! The whole probe on loopback, through a relay that harms the traffic in a known way.
//!
//! Counts are asserted exactly. Gaps are compared with what the relay really did, allowing one period and the longest
//! time that any packet spent in the relay, which is how much the machine was late.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{
    io::{BufRead, BufReader, Write},
    thread,
};

use crate::support::{
    Canary, Fate, Harm, PERIOD_MS, Relay, TcpFate, Truth, config, measure, reflector, wait_until,
};
use dataplane_probe::clock::millis;
use dataplane_probe::reflect::{self, Reflector};
use dataplane_probe::report::{Direction, Family};
use dataplane_probe::run::{Callee, Config, Error, Probe};
use dataplane_probe::wire::{Body, Data, Packet, Received, Role};

fn target(reflector: &Reflector) -> SocketAddr {
    reflector.addresses()[0]
}

fn drop_range(range: std::ops::Range<u64>) -> Box<dyn FnMut(Data) -> Fate + Send> {
    Box::new(move |data| {
        if range.contains(&data.sequence) {
            Fate::Drop
        } else {
            Fate::Pass
        }
    })
}

fn assert_untouched(direction: &Direction) {
    assert_eq!(
        (direction.lost, direction.duplicated, direction.reordered),
        (0, 0, 0),
        "{direction:?}"
    );
    assert_eq!(direction.sent, direction.received);
}

/// `jitter_ns`: what the path that the figure came by may have added at either end.
fn assert_gap(direction: &Direction, truth: Truth, jitter_ns: u64) {
    let gap = direction.service_gap_ms.expect("packets arrived");
    let allowed = PERIOD_MS + millis(jitter_ns);
    let (least, most) = (
        millis(truth.gap_ns.0) - PERIOD_MS - allowed,
        millis(truth.gap_ns.1) - PERIOD_MS + allowed,
    );
    assert!(
        (least..=most).contains(&gap),
        "a gap of {gap} ms, not {least} to {most} ms; {truth:?}"
    );
}

#[test]
fn a_quiet_path_loses_nothing() {
    let reflector = reflector();
    let outcome = measure(Config {
        stream_every: Some(Duration::from_millis(10)),
        ..config(target(&reflector), 1500)
    });
    let report = outcome.report;
    assert_untouched(&report.to_vm);
    assert_untouched(&report.from_vm);
    assert_eq!((report.to_vm.sent, report.family), (1500, Family::Ipv4));
    assert_eq!((report.valid, &report.reasons), (true, &Vec::new()));
    let tcp = report.tcp.expect("a stream was asked for");
    assert!(tcp.survived, "{tcp:?}");
    assert_eq!(tcp.bytes_sent, tcp.bytes_echoed);
    assert!(tcp.bytes_sent >= 100 * 64, "{tcp:?}");
}

#[test]
fn ipv6_works_as_well() {
    let bind = vec![Ipv6Addr::LOCALHOST.into()];
    let reflector = Reflector::start(&reflect::Config {
        bind,
        port: 0,
        ..reflect::Config::default()
    })
    .expect("loopback is there");
    let connect_every = Some(Duration::from_millis(50));
    let report = measure(Config {
        connect_every,
        ..config(target(&reflector), 500)
    })
    .report;
    assert_untouched(&report.to_vm);
    assert_untouched(&report.from_vm);
    assert_eq!((report.to_vm.sent, report.family), (500, Family::Ipv6));
    let connections = report.new_connections.expect("they were asked for");
    assert_eq!(connections.failed, 0, "{connections:?}");
    assert!(connections.attempted >= 10, "{connections:?}");
}

#[test]
fn a_machine_that_calls_is_measured_like_one_that_is_called() {
    let reflector = reflector();
    let callee = Callee::bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback is there");
    let report = measure(Config {
        called_at: Some(Arc::new(callee)),
        stream_every: Some(Duration::from_millis(10)),
        connect_every: Some(Duration::from_millis(50)),
        ..config(target(&reflector), 1000)
    })
    .report;
    assert_untouched(&report.to_vm);
    assert_untouched(&report.from_vm);
    assert_eq!((report.to_vm.sent, &report.reasons), (1000, &Vec::new()));
    let tcp = report.tcp.expect("a stream was asked for");
    assert!(tcp.survived && tcp.bytes_echoed > 0, "{tcp:?}");
    let connections = report.new_connections.expect("they were asked for");
    assert_eq!(connections.failed, 0, "{connections:?}");
    assert!(connections.attempted >= 10, "{connections:?}");
    let [heard] = report.callers[..] else {
        panic!("one address calls: {:?}", report.callers);
    };
    assert_eq!(heard.address, Ipv4Addr::LOCALHOST);
    // Its greeting counts as well, however often it was repeated.
    assert!(heard.packets > report.from_vm.received, "{heard:?}");
    assert_eq!(heard.connections, connections.attempted + 1);
}

#[test]
fn a_reflector_calls_nobody_unless_it_may() {
    let reflector = Reflector::start(&reflect::Config {
        bind: vec![Ipv4Addr::LOCALHOST.into()],
        ..reflect::Config::default()
    })
    .expect("loopback is there");
    let callee = Callee::bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback is there");
    let refused = Probe::start(Config {
        called_at: Some(Arc::new(callee)),
        ..config(target(&reflector), 100)
    });
    assert!(
        matches!(&refused, Err(Error::Refused { reason, .. }) if reason.contains("--may-call")),
        "{refused:?}"
    );
}

#[test]
fn an_outage_towards_the_vm_is_reported_there_and_only_there() {
    let reflector = reflector();
    let harm = Harm {
        to_vm: drop_range(400..537),
        ..Harm::default()
    };
    let relay = Relay::start(target(&reflector), harm);
    let report = measure(config(relay.address(), 1000)).report;
    assert_eq!(
        (report.to_vm.sent, report.to_vm.received, report.to_vm.lost),
        (1000, 863, 137),
        "{:?} {:?}",
        report.to_vm,
        report.reasons
    );
    assert_eq!(
        (report.to_vm.longest_loss_ms, report.to_vm.loss_run_count),
        (137.0, 1)
    );
    let run = report.to_vm.loss_runs[0];
    assert_eq!(
        (run.first, run.count, run.start_ns),
        (400, 137, Some(report.started_ns + 400_000_000))
    );
    assert_gap(
        &report.to_vm,
        relay.truth_to_vm(),
        relay.truth_to_vm().transit_ns + relay.truth_from_vm().transit_ns,
    );
    assert_untouched(&report.from_vm);
    assert_gap(
        &report.from_vm,
        relay.truth_from_vm(),
        relay.truth_from_vm().transit_ns,
    );
}

#[test]
fn an_outage_from_the_vm_is_reported_there_and_only_there() {
    let reflector = reflector();
    let harm = Harm {
        from_vm: drop_range(400..537),
        ..Harm::default()
    };
    let relay = Relay::start(target(&reflector), harm);
    let probe = Probe::start(config(relay.address(), 60_000)).expect("the reflector is there");
    // On a busy machine the reflector may take longer to get there than the client.
    wait_until(&probe, |progress| progress.received >= 700);
    let report = probe.finish().report;
    assert_eq!(
        (report.from_vm.lost, report.from_vm.longest_loss_ms),
        (137, 137.0)
    );
    let run = report.from_vm.loss_runs[0];
    let times = (run.start_ns, run.end_ns);
    let gaps = &report.from_vm.gaps;
    let in_gaps = gaps
        .iter()
        .any(|gap| times == (Some(gap.start_ns), Some(gap.end_ns)));
    // A relay that was late itself has passed everything on in one burst, which leaves no gap to be listed.
    let burst = run
        .end_ns
        .zip(run.start_ns)
        .is_some_and(|(end, start)| end - start <= 2_000_000);
    assert!(in_gaps || burst, "{run:?} {gaps:?}");
    assert_gap(
        &report.from_vm,
        relay.truth_from_vm(),
        relay.truth_from_vm().transit_ns,
    );
    assert_untouched(&report.to_vm);
    // What the client did not hear for 137 ms is no outage of the other direction.
    assert_gap(
        &report.to_vm,
        relay.truth_to_vm(),
        relay.truth_to_vm().transit_ns + relay.truth_from_vm().transit_ns,
    );
}

#[test]
fn a_duplicate_does_not_make_up_for_a_loss() {
    let fates = |data: Data| match data.sequence {
        100 => Fate::Twice,
        101 => Fate::Drop,
        _ => Fate::Pass,
    };
    let reflector = reflector();
    let harm = Harm {
        to_vm: Box::new(fates),
        from_vm: Box::new(fates),
        ..Harm::default()
    };
    let relay = Relay::start(target(&reflector), harm);
    let report = measure(config(relay.address(), 400)).report;
    for direction in [&report.to_vm, &report.from_vm] {
        assert_eq!(
            (direction.duplicated, direction.lost, direction.reordered),
            (1, 1, 0)
        );
        assert_eq!(direction.received, direction.sent - 1);
    }
}

#[test]
fn overtaken_packets_are_reordered_not_lost() {
    let reflector = reflector();
    let swap = |data: Data| {
        if data.sequence % 100 == 50 {
            Fate::Swap
        } else {
            Fate::Pass
        }
    };
    let relay = Relay::start(
        target(&reflector),
        Harm {
            to_vm: Box::new(swap),
            ..Harm::default()
        },
    );
    let report = measure(config(relay.address(), 400)).report;
    assert_eq!(
        (
            report.to_vm.reordered,
            report.to_vm.lost,
            report.to_vm.duplicated
        ),
        (4, 0, 0)
    );
    assert_untouched(&report.from_vm);
}

#[test]
fn a_lost_tail_is_lost_and_its_gap_open() {
    let reflector = reflector();
    let relay = Relay::start(
        target(&reflector),
        Harm {
            to_vm: drop_range(300..800),
            ..Harm::default()
        },
    );
    let drain = Duration::from_millis(300);
    let report = measure(Config {
        drain,
        ..config(relay.address(), 800)
    })
    .report;
    assert_eq!(
        (report.to_vm.lost, report.to_vm.longest_loss_ms),
        (500, 500.0)
    );
    let open: Vec<_> = report.to_vm.gaps.iter().filter(|gap| gap.open).collect();
    assert_eq!(
        open.iter().map(|gap| gap.end_ns).collect::<Vec<_>>(),
        [report.ended_ns]
    );
    // One packet may have been some periods late before; those of the tail were due for 500.
    assert!(
        open[0].ms <= 500.0 + millis(relay.truth_to_vm().transit_ns),
        "{open:?}"
    );
}

#[test]
fn packets_on_their_way_at_the_end_are_waited_for() {
    let reflector = reflector();
    let hold = |data: Data| {
        if data.sequence >= 380 {
            Fate::Hold(Duration::from_millis(400))
        } else {
            Fate::Pass
        }
    };
    let relay = Relay::start(
        target(&reflector),
        Harm {
            to_vm: Box::new(hold),
            ..Harm::default()
        },
    );
    let report = measure(Config {
        drain: Duration::from_secs(10),
        ..config(relay.address(), 400)
    })
    .report;
    assert_eq!(
        (
            report.to_vm.lost,
            report.to_vm.received,
            report.to_vm.duplicated
        ),
        (0, 400, 0)
    );
}

#[test]
fn foreign_packets_are_counted_as_such_and_never_as_received() {
    let reflector = reflector();
    let relay = Relay::start(target(&reflector), Harm::default());
    let probe = Probe::start(config(relay.address(), 500)).expect("the reflector is there");
    let mut stray = [0; 128];
    for session in [probe.session() ^ 1, 0] {
        let data = Data {
            sequence: 3,
            ..Data::default()
        };
        Packet {
            session,
            body: Body::FromVm(data, Received::default()),
        }
        .encode(&mut stray);
        relay.inject(&stray);
        Packet {
            session,
            body: Body::ToVm(data),
        }
        .encode(&mut stray);
        let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback is there");
        socket
            .send_to(&stray, target(&reflector))
            .expect("loopback takes it");
    }
    relay.inject(b"hello");
    relay.inject(&[]);
    while !probe.is_over() {
        thread::sleep(Duration::from_millis(5));
    }
    let report = probe.finish().report;
    assert_eq!(report.foreign, 4);
    assert_untouched(&report.to_vm);
    assert_untouched(&report.from_vm);
}

#[test]
fn a_stall_of_the_stream_is_measured() {
    let reflector = reflector();
    let hold = Duration::from_millis(500);
    let tcp = move |role| {
        if role == Role::Stream {
            TcpFate::Stall(1000, hold)
        } else {
            TcpFate::Relay
        }
    };
    let relay = Relay::start(
        target(&reflector),
        Harm {
            tcp: Box::new(tcp),
            ..Harm::default()
        },
    );
    let canary = Canary::start();
    let stream_every = Some(Duration::from_millis(10));
    let report = measure(Config {
        stream_every,
        ..config(relay.address(), 1200)
    })
    .report;
    let tcp = report.tcp.expect("a stream was asked for");
    assert!(tcp.survived, "{tcp:?}");
    let held_ms = millis(relay.held_ns.load(std::sync::atomic::Ordering::Relaxed));
    assert!(held_ms >= 500.0);
    // The echo before the stall may be up to one period old when it begins; after it, relay and client have to wake up.
    let awake_ms = 10.0 + 3.0 * millis(canary.stop());
    let stall = tcp.longest_stall_ms;
    let allowed = held_ms - 10.0..=held_ms + awake_ms;
    assert!(
        allowed.contains(&stall),
        "a stall of {stall} ms, not {allowed:?}"
    );
    let longest = tcp.gaps.iter().map(|gap| gap.ms).fold(0.0, f64::max);
    assert!((longest - stall).abs() < 1e-6, "{:?}", tcp.gaps);
}

#[test]
fn a_broken_stream_did_not_survive() {
    let reflector = reflector();
    let tcp = |role| {
        if role == Role::Stream {
            TcpFate::Break(1000)
        } else {
            TcpFate::Relay
        }
    };
    let relay = Relay::start(
        target(&reflector),
        Harm {
            tcp: Box::new(tcp),
            ..Harm::default()
        },
    );
    let stream_every = Some(Duration::from_millis(10));
    let report = measure(Config {
        stream_every,
        ..config(relay.address(), 500)
    })
    .report;
    let tcp = report.tcp.expect("a stream was asked for");
    assert!(!tcp.survived && tcp.error.is_some(), "{tcp:?}");
}

#[test]
fn failed_connections_are_counted_by_kind_and_delay_no_other() {
    let reflector = reflector();
    let mut number = 0;
    let tcp = move |role| {
        if role != Role::Connect {
            return TcpFate::Relay;
        }
        number += 1;
        match number {
            3 | 4 => TcpFate::Ignore,
            6..=8 => TcpFate::Close,
            _ => TcpFate::Relay,
        }
    };
    let relay = Relay::start(
        target(&reflector),
        Harm {
            tcp: Box::new(tcp),
            ..Harm::default()
        },
    );
    let every = Duration::from_millis(50);
    // Sixty times the interval: had they waited for each other, the third would have been the last.
    let connect_timeout = Duration::from_secs(3);
    let report = measure(Config {
        connect_every: Some(every),
        connect_timeout,
        ..config(relay.address(), 1000)
    })
    .report;
    let connections = report.new_connections.expect("they were asked for");
    let kinds = (
        connections.timed_out,
        connections.reset,
        connections.refused,
        connections.other,
    );
    assert_eq!(
        (connections.failed, kinds),
        (5, (2, 3, 0, 0)),
        "{connections:?}"
    );
    assert!(connections.attempted >= 8, "{connections:?}");
}

#[test]
fn sessions_do_not_disturb_each_other() {
    let reflector = reflector();
    let target = target(&reflector);
    let relay = Relay::start(
        target,
        Harm {
            to_vm: drop_range(100..110),
            ..Harm::default()
        },
    );
    let harmed = relay.address();
    let runs = [harmed, target, target]
        .map(|address| thread::spawn(move || measure(config(address, 400)).report));
    let lost = runs.map(|run| run.join().expect("it ends").to_vm.lost);
    assert_eq!(lost, [10, 0, 0]);
}

#[test]
fn there_is_a_bound_on_sessions_and_room_again_after_some_ended() {
    let reflector = reflector();
    // Slow ones: it is their number that matters.
    let start = || {
        Probe::start(Config {
            rate_hz: 10,
            ..config(target(&reflector), 60_000)
        })
    };
    let mut probes: Vec<Probe> = (0..reflect::MAX_SESSIONS)
        .map(|_| start().expect("there is room"))
        .collect();
    let refused = start().expect_err("there is no room");
    assert!(
        matches!(&refused, Error::Refused { reason, .. } if reason.contains("16 sessions")),
        "{refused}"
    );
    probes.pop().expect("there are sixteen").finish();
    start().expect("there is room again").finish();
}

#[test]
fn a_reflector_that_is_gone_at_the_end_makes_the_run_invalid() {
    let reflector = reflector();
    let account_timeout = Duration::from_millis(300);
    let drain = Duration::from_millis(300);
    let config = Config {
        account_timeout,
        drain,
        ..config(target(&reflector), 60_000)
    };
    let probe = Probe::start(config).expect("the reflector is there");
    wait_until(&probe, |progress| progress.reflector_received >= 100);
    drop(reflector);
    let gone = probe.progress().sent;
    wait_until(&probe, |progress| progress.sent >= gone + 100);
    let report = probe.finish().report;
    assert!(!report.valid);
    assert!(
        report
            .reasons
            .iter()
            .any(|reason| reason.contains("account could not be had")),
        "{:?}",
        report.reasons
    );
    assert!(
        report.to_vm.lost >= 100 && report.to_vm.received >= 100,
        "{:?}",
        report.to_vm
    );
    assert!(report.from_vm.service_gap_open && report.to_vm.service_gap_open);
}

#[test]
fn a_late_sender_makes_the_run_invalid() {
    let reflector = reflector();
    // No packet can be sent in no time.
    let config = Config {
        max_late: Duration::ZERO,
        ..config(target(&reflector), 300)
    };
    let report = measure(config).report;
    assert!(
        !report.valid && report.to_vm.sender.over_bound > 0,
        "{:?}",
        report.to_vm.sender
    );
    assert!(
        report
            .reasons
            .iter()
            .any(|reason| reason.contains("--max-late-ms")),
        "{:?}",
        report.reasons
    );
}

#[test]
fn nobody_there_is_said_in_time_and_with_a_remedy() {
    let closed = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("loopback");
    let begun = Instant::now();
    let reach = Duration::from_millis(300);
    let error = Probe::start(Config {
        reach,
        ..config(closed, 100)
    })
    .expect_err("nobody listens");
    assert!(begun.elapsed() < Duration::from_secs(5));
    let said = error.to_string();
    assert!(matches!(error, Error::Unreachable { .. }), "{said}");
    assert!(
        said.contains("refused") && said.contains("ip route get 127.0.0.1"),
        "{said}"
    );
}

#[test]
fn blocked_udp_is_told_from_blocked_tcp() {
    let reflector = reflector();
    let relay = Relay::start(
        target(&reflector),
        Harm {
            greetings: false,
            ..Harm::default()
        },
    );
    let reach = Duration::from_millis(300);
    let error = Probe::start(Config {
        reach,
        ..config(relay.address(), 100)
    })
    .expect_err("UDP does not pass");
    assert!(matches!(error, Error::UdpUnreachable { .. }), "{error}");
}

#[test]
fn a_stranger_is_not_taken_for_a_reflector() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let address = listener.local_addr().expect("bound");
    let stranger = thread::spawn(move || {
        let (mut connection, _) = listener.accept().expect("a client comes");
        BufReader::new(&connection)
            .read_until(b'\n', &mut Vec::new())
            .expect("it asks");
        connection
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .expect("it listens");
    });
    let error = Probe::start(config(address, 100)).expect_err("it is no reflector");
    stranger.join().expect("it does no more than that");
    assert!(matches!(error, Error::NotAReflector { .. }), "{error}");
}

#[test]
fn nonsense_is_refused_before_anything_is_sent() {
    let target: SocketAddr = "127.0.0.1:7000".parse().expect("valid");
    let wrong = [
        Config {
            rate_hz: 0,
            ..Config::new(target)
        },
        Config {
            rate_hz: 10_001,
            ..Config::new(target)
        },
        Config {
            packet_bytes: 10,
            ..Config::new(target)
        },
        Config {
            stream_every: Some(Duration::ZERO),
            ..Config::new(target)
        },
        Config::new("0.0.0.0:7000".parse().expect("valid")),
    ];
    for config in wrong {
        let said = format!("{config:?}");
        assert!(
            matches!(Probe::start(config), Err(Error::Config(_))),
            "{said}"
        );
    }
}

#[test]
fn the_log_has_every_packet_and_what_became_of_it() {
    let reflector = reflector();
    let mut fates = drop_range(200..250);
    let relay = Relay::start(
        target(&reflector),
        Harm {
            to_vm: Box::new(move |data| match data.sequence {
                300 => Fate::Twice,
                _ => fates(data),
            }),
            from_vm: drop_range(100..103),
            ..Harm::default()
        },
    );
    let outcome = measure(Config {
        log: true,
        ..config(relay.address(), 600)
    });
    assert_eq!(outcome.warnings, Vec::<String>::new());
    let packets = outcome.packets.expect("a log was asked for");
    assert_eq!(packets.forgotten, 0);
    let (to_vm, from_vm) = (&outcome.report.to_vm, &outcome.report.from_vm);
    for (traces, direction) in [(&packets.to_vm, to_vm), (&packets.from_vm, from_vm)] {
        assert_eq!(traces.len() as u64, direction.sent);
        let lost = traces.iter().filter(|it| it.arrivals.is_empty()).count();
        assert_eq!(lost as u64, direction.lost);
        let copies: usize = traces.iter().map(|it| it.arrivals.len()).sum();
        assert_eq!(copies as u64, direction.received + direction.duplicated);
        assert!(
            traces.is_sorted_by(|one, next| one.sent.earliest_ns <= next.sent.earliest_ns),
            "sendings are in order"
        );
    }
    assert_eq!((to_vm.lost, from_vm.lost, to_vm.duplicated), (50, 3, 1));
    // One machine, one clock that never stands still: nothing arrives before it was sent, nor after the run.
    for trace in &packets.to_vm {
        for arrival in &trace.arrivals {
            assert!(arrival.earliest_ns >= trace.sent.earliest_ns, "{trace:?}");
            assert!(arrival.latest_ns <= outcome.report.ended_ns + 2_000_000_000);
        }
    }
}

#[test]
fn without_being_asked_for_there_is_no_log() {
    let reflector = reflector();
    let outcome = measure(config(target(&reflector), 50));
    assert_eq!(outcome.packets, None);
}
