//! Between two network namespaces, with packets dropped by the kernel for a known time.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dataplane_probe::clock::{MICROSECOND, millis};
use dataplane_probe::report::{Direction, Report};
use dataplane_probe::watch;

const OUTAGE: Duration = Duration::from_millis(137);
const PERIOD_MS: f64 = 1.0;

/// Two namespaces and a link between them; gone when dropped.
struct Pair {
    client: String,
    vm: String,
}

impl Pair {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |side: &str| format!("dpp-{}-{number}-{side}", std::process::id());
        let pair = Self {
            client: name("client"),
            vm: name("vm"),
        };
        ip(&["netns", "add", &pair.client]);
        ip(&["netns", "add", &pair.vm]);
        ip(&[
            "-n",
            &pair.client,
            "link",
            "add",
            "c0",
            "type",
            "veth",
            "peer",
            "name",
            "v0",
            "netns",
            &pair.vm,
        ]);
        for (namespace, device, address) in [
            (&pair.client, "c0", "10.77.0.1/24"),
            (&pair.vm, "v0", "10.77.0.2/24"),
        ] {
            ip(&["-n", namespace, "addr", "add", address, "dev", device]);
            ip(&["-n", namespace, "link", "set", device, "up"]);
        }
        pair
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for namespace in [&self.client, &self.vm] {
            let _ = Command::new("ip")
                .args(["netns", "del", namespace])
                .status();
        }
    }
}

/// A program in a namespace; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ip(arguments: &[&str]) {
    assert!(
        Command::new("ip")
            .args(arguments)
            .status()
            .expect("iproute2")
            .success(),
        "ip {arguments:?}"
    );
}

fn inside(namespace: &str, program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", namespace, program])
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// Does something on a thread in a namespace.
fn within<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let file = File::open(format!("/run/netns/{namespace}")).expect("it was made");
    let inside = move || {
        // SAFETY: takes plain integers.
        let entered = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(entered, 0, "{}", std::io::Error::last_os_error());
        work()
    };
    thread::scope(|scope| scope.spawn(inside).join().expect("it is done"))
}

fn nft(namespace: &str, rule: &str) {
    assert!(
        inside(namespace, "nft", &[rule])
            .status()
            .expect("iproute2")
            .success(),
        "nft {rule}"
    );
}

/// Drops for [`OUTAGE`]; how long at least and at most it really was, in ms.
fn outage(namespace: &str, condition: &str) -> (f64, f64) {
    nft(namespace, "add table inet harm");
    nft(
        namespace,
        "add chain inet harm input { type filter hook input priority 0; }",
    );
    let before = Instant::now();
    nft(
        namespace,
        &format!("add rule inet harm input {condition} drop"),
    );
    let begun = Instant::now();
    thread::sleep(OUTAGE);
    let least = begun.elapsed();
    nft(namespace, "delete table inet harm");
    (
        least.as_secs_f64() * 1000.0,
        before.elapsed().as_secs_f64() * 1000.0,
    )
}

fn measure(drop_at_vm: bool) -> (Report, (f64, f64)) {
    let pair = Pair::new();
    let program = env!("CARGO_BIN_EXE_dataplane-probe");
    let _reflector = Running(
        inside(&pair.vm, program, &["reflect"])
            .spawn()
            .expect("iproute2"),
    );
    let arguments = [
        "run",
        "--target",
        "10.77.0.2",
        "--duration",
        "3s",
        "--json",
        "-",
        "--max-late-ms",
        "60000",
    ];
    let mut client = inside(&pair.client, program, &arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("iproute2");
    let mut line = String::new();
    BufReader::new(client.stderr.take().expect("piped"))
        .read_line(&mut line)
        .expect("it tells when it has begun");
    assert!(line.starts_with("measuring"), "{line}");
    let really = if drop_at_vm {
        outage(&pair.vm, "udp dport 7000")
    } else {
        outage(&pair.client, "udp sport 7000")
    };
    let output = client.wait_with_output().expect("it ends");
    assert!(output.status.success());
    (
        serde_json::from_slice(&output.stdout).expect("a report"),
        really,
    )
}

/// A sender that was late itself sent fewer packets into the outage, or more after it: its lateness is the tolerance.
fn assert_outage(direction: &Direction, (least, most): (f64, f64)) {
    let late_ms =
        millis(direction.sender.max_us * MICROSECOND).max(direction.sender.longest_reschedule_ms);
    let allowed = least - PERIOD_MS - late_ms..=most + PERIOD_MS + late_ms;
    for figure in [
        direction.longest_loss_ms,
        direction.service_gap_ms.expect("packets arrived"),
    ] {
        assert!(
            allowed.contains(&figure),
            "{figure} ms, not {allowed:?}; {direction:?}"
        );
    }
    assert_eq!(
        (
            direction.loss_run_count,
            direction.duplicated,
            direction.reordered
        ),
        (1, 0, 0)
    );
}

fn assert_quiet(direction: &Direction) {
    assert_eq!(
        (direction.lost, direction.duplicated, direction.reordered),
        (0, 0, 0)
    );
}

#[test]
#[ignore = "needs root and nftables: sudo -E cargo test -p dataplane-probe --test e2e -- --ignored namespaces"]
fn a_drop_in_front_of_the_vm_is_reported_within_a_period() {
    let (report, really) = measure(true);
    assert_outage(&report.to_vm, really);
    assert_quiet(&report.from_vm);
}

#[test]
#[ignore = "needs root and nftables: sudo -E cargo test -p dataplane-probe --test e2e -- --ignored namespaces"]
fn a_drop_in_front_of_the_client_is_reported_within_a_period() {
    let (report, really) = measure(false);
    assert_outage(&report.from_vm, really);
    assert_quiet(&report.to_vm);
}

/// Everything to port 7001 of the VM, watched where the VM's end of the link is.
fn watcher(pair: &Pair) -> watch::Watcher {
    let config = watch::Config {
        interface: "v0".to_owned(),
        mac: None,
        port: Some(7_001),
        all: false,
    };
    within(&pair.vm, || watch::Watcher::open(&config)).expect("the link is there")
}

/// Sends so many packets to it.
fn send(pair: &Pair, packets: usize) {
    within(&pair.client, || {
        let socket = UdpSocket::bind("10.77.0.1:0").expect("its address");
        for _ in 0..packets {
            // The VM's answer, that nobody is there, is told by the next call.
            while socket.send_to(&[0; 64], "10.77.0.2:7001").is_err() {}
        }
    });
}

/// How many frames it tells of until nothing more comes.
fn told(watcher: &mut watch::Watcher) -> Result<usize, watch::Error> {
    let mut frames = 0;
    let is_frame = |event: &&watch::Event| matches!(event, watch::Event::Frame { .. });
    loop {
        let events = watcher.poll()?.expect("it was not stopped");
        if events.is_empty() {
            return Ok(frames);
        }
        frames += events.iter().filter(is_frame).count();
    }
}

#[test]
#[ignore = "needs root: sudo -E cargo test -p dataplane-probe --test e2e -- --ignored namespaces"]
fn frames_that_find_no_room_are_counted() {
    const MANY: usize = 50_000;
    let pair = Pair::new();
    let mut watcher = watcher(&pair);
    send(&pair, 10);
    assert_eq!(told(&mut watcher).expect("the link is there"), 10);
    assert_eq!(watcher.dropped().expect("the socket says"), 0);

    send(&pair, MANY);
    let seen = told(&mut watcher).expect("the link is there");
    assert!(seen < MANY, "the buffer has room for all of them");
    let missed = u64::try_from(MANY - seen).expect("few");
    let dropped = watcher.dropped().expect("the socket says");
    // The link may have lost some before they got there.
    assert!((1..=missed).contains(&dropped), "{dropped} of {missed}");
    assert_eq!(watcher.dropped().expect("the socket says"), dropped);
}

#[test]
#[ignore = "needs root: sudo -E cargo test -p dataplane-probe --test e2e -- --ignored namespaces"]
fn an_interface_that_goes_ends_the_watch_after_its_last_frame() {
    let pair = Pair::new();
    let mut watcher = watcher(&pair);
    send(&pair, 10);
    // Another one comes by its name before anybody looks.
    ip(&["-n", &pair.vm, "link", "del", "v0"]);
    ip(&[
        "-n", &pair.vm, "link", "add", "v0", "type", "veth", "peer", "name", "w0",
    ]);
    let mut frames = 0;
    let mut downs = 0;
    let error = within(&pair.vm, || {
        loop {
            match watcher.poll() {
                Ok(events) => {
                    for event in events.expect("it was not stopped") {
                        match event {
                            watch::Event::Frame { .. } => frames += 1,
                            _ => downs += 1,
                        }
                    }
                }
                Err(error) => return error,
            }
        }
    });
    assert!(matches!(error, watch::Error::Gone { .. }), "{error}");
    assert_eq!((frames, downs), (10, 1));
}

#[test]
#[ignore = "needs root: sudo -E cargo test -p dataplane-probe --test e2e -- --ignored namespaces"]
fn an_interface_that_was_down_is_watched_on() {
    let pair = Pair::new();
    let mut watcher = watcher(&pair);
    ip(&["-n", &pair.vm, "link", "set", "v0", "down"]);
    ip(&["-n", &pair.vm, "link", "set", "v0", "up"]);
    send(&pair, 10);
    let frames = within(&pair.vm, || {
        let down = watcher.poll().expect("it is there").expect("not stopped");
        assert!(matches!(down[..], [watch::Event::Down { .. }]), "{down:?}");
        told(&mut watcher)
    });
    assert_eq!(frames.expect("it is there"), 10);
}
