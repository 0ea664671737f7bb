//! Between two network namespaces, with packets dropped by the kernel for a known time.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dataplane_probe::clock::{MICROSECOND, millis};
use dataplane_probe::report::{Direction, Report};

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
