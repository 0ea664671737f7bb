//! What the program prints, writes and exits with.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::support::{Fate, Harm, Relay, reflector};
use dataplane_probe::report::{Report, SCHEMA};

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dataplane-probe"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(target: &str, arguments: &[&str]) -> Output {
    program()
        .args(["run", "--target", target])
        .args(arguments)
        .output()
        .expect("it is built")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn interrupt(child: &Child, signal: i32) {
    let pid = i32::try_from(child.id()).expect("a process id");
    // SAFETY: plain integers; the child has not been waited for, so the id is still its own.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// Five packets lost and one doubled on the way to the VM.
fn harmed(target: std::net::SocketAddr) -> Relay {
    let fate = |data: dataplane_probe::wire::Data| match data.sequence {
        100..105 => Fate::Drop,
        110 => Fate::Twice,
        _ => Fate::Pass,
    };
    Relay::start(
        target,
        Harm {
            to_vm: Box::new(fate),
            ..Harm::default()
        },
    )
}

#[test]
fn thresholds_decide_the_exit_code_and_are_named() {
    let reflector = reflector();
    let relay = harmed(reflector.addresses()[0]);
    let target = relay.address().to_string();
    let common = ["--duration", "300ms", "--quiet", "--no-stream"];
    let kept = run(
        &target,
        &[
            &common[..],
            &[
                "--max-lost",
                "5",
                "--max-duplicated",
                "1",
                "--max-loss-ms",
                "5",
            ],
        ]
        .concat(),
    );
    assert_eq!(kept.status.code(), Some(0), "{}", text(&kept.stderr));
    let exceeded = run(
        &target,
        &[&common[..], &["--max-lost", "4", "--max-duplicated", "0"]].concat(),
    );
    assert_eq!(exceeded.status.code(), Some(1));
    let said = text(&exceeded.stderr);
    assert!(said.contains("to_vm.lost is 5, allowed: 4"), "{said}");
    assert!(said.contains("to_vm.duplicated is 1, allowed: 0"), "{said}");
    assert!(!said.contains("from_vm"), "{said}");
    assert!(
        text(&exceeded.stdout).contains("longest loss"),
        "the table is printed all the same"
    );
}

#[test]
fn writes_report_histograms_and_events() {
    let reflector = reflector();
    let relay = harmed(reflector.addresses()[0]);
    let directory = tempfile::tempdir().expect("a writable directory");
    let path = |name: &str| directory.path().join(name);
    let show = |path: &Path| path.to_str().expect("it is UTF-8").to_owned();
    let (json, log, events) = (path("report.json"), path("run.hlog"), path("events.jsonl"));
    let files = [
        "--json",
        &show(&json),
        "--histogram",
        &show(&log),
        "--events",
        &show(&events),
    ];
    let output = run(
        &relay.address().to_string(),
        &[&["--duration", "300ms"], &files[..]].concat(),
    );
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let report: Report =
        serde_json::from_slice(&std::fs::read(json).expect("written")).expect("a report");
    assert_eq!(
        (report.schema.as_str(), report.to_vm.sent, report.to_vm.lost),
        (SCHEMA, 300, 5)
    );
    let log = std::fs::read_to_string(log).expect("written");
    for tag in [
        "to_vm_sender_late",
        "from_vm_sender_late",
        "from_vm_between_arrivals",
        "round_trip",
        "new_connection",
    ] {
        assert!(log.contains(&format!("Tag={tag},0.000,")), "{tag}: {log}");
    }
    let events: Vec<serde_json::Value> = std::fs::read_to_string(events)
        .expect("written")
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let count = |name: &str| events.iter().filter(|event| event["event"] == name).count() as u64;
    assert_eq!(
        (count("sent"), count("received"), count("lost")),
        (300, report.from_vm.received, 1)
    );
    assert!(count("echo") > 0 && count("connection") > 0);
}

#[test]
fn a_signal_ends_a_run_with_a_report() {
    let mut reflecting = program()
        .args(["reflect", "--bind", "127.0.0.1", "--port", "0"])
        .spawn()
        .expect("built");
    let mut line = String::new();
    BufReader::new(reflecting.stdout.take().expect("piped"))
        .read_line(&mut line)
        .expect("it tells where it serves");
    let target = line
        .trim()
        .strip_prefix("reflecting on ")
        .expect("it tells where it serves");
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut running = program()
            .args(["run", "--target", target, "--json", "-"])
            .spawn()
            .expect("built");
        let mut said = BufReader::new(running.stderr.take().expect("piped"));
        let mut line = String::new();
        said.read_line(&mut line)
            .expect("it tells when it has begun");
        assert!(line.starts_with("measuring 127.0.0.1:"), "{line}");
        interrupt(&running, signal);
        let mut rest = String::new();
        said.read_to_string(&mut rest).expect("UTF-8");
        let output = running.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(0), "{rest}");
        let report: Report =
            serde_json::from_slice(&output.stdout).expect("a report on standard output");
        assert_eq!(report.to_vm.lost, 0);
    }
    interrupt(&reflecting, libc::SIGTERM);
    assert_eq!(reflecting.wait().expect("it ends").code(), Some(0));
}

#[test]
fn what_cannot_be_measured_exits_with_2() {
    for (arguments, expected) in [
        (
            ["--target", "127.0.0.1:1", "--reach", "200ms"],
            "check that `dataplane-probe reflect` runs",
        ),
        (
            ["--target", "127.0.0.1:1", "--rate", "20000"],
            "between 1 and 10000",
        ),
        (
            ["--target", "127.0.0.1:1", "--duration", "5 parsecs"],
            "is no unit",
        ),
    ] {
        let output = program()
            .arg("run")
            .args(arguments)
            .output()
            .expect("it is built");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(
            text(&output.stderr).contains(expected),
            "{}",
            text(&output.stderr)
        );
    }
}
