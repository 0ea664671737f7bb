//! With shell scripts in virsh's place.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::signals::lifecycle::Change;

const PATIENCE: Duration = Duration::from_secs(20);
const EVENT: &str =
    "2026-09-01 10:00:05.123+0000: event 'lifecycle' for domain 'default_web': Suspended Migrated";

/// A directory with a program that does this.
fn script(text: &str) -> (TempDir, Virsh) {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("virsh");
    fs::write(
        &program,
        format!("#!/bin/sh\ncd {}\n{text}", directory.path().display()),
    )
    .unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let virsh = Virsh {
        program,
        daemon: Daemon::Uri("qemu:///system".to_owned()),
        counts: Arc::default(),
        starting: Arc::new(Semaphore::new(1)),
    };
    (directory, virsh)
}

async fn connect(virsh: &Virsh) -> Result<Running, SourceError> {
    loop {
        match virsh.connect().await {
            // Another test's fork may hold the script open for writing for a moment (ETXTBSY).
            Err(SourceError::Start { source, .. })
                if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
            other => return other,
        }
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("in time")
}

/// Whether a process, whose number a file holds, is there and no zombie.
fn lives(pid: &Path) -> bool {
    let pid = fs::read_to_string(pid).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", pid.trim()));
    status.is_ok_and(|status| !status.contains("State:\tZ"))
}

async fn until(what: &str, mut there: impl FnMut() -> bool) {
    let wait = async {
        while !there() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"));
}

#[tokio::test]
async fn an_event_that_comes_in_pieces_between_nonsense() {
    let (stamp, rest) = EVENT.split_at(30);
    let (_directory, virsh) = script(&format!(
        r#"
        echo host-7
        printf '\377\376 garbage\n\n'
        head -c 100000 /dev/zero | tr '\0' x; echo
        printf '%s' "{stamp}"; sleep 0.05; printf '%s\n' "{rest}"
        exec sleep 1000
        "#
    ));
    let mut running = within(connect(&virsh)).await.unwrap();
    let before = Nanos::now();
    let happened = within(running.next()).await.unwrap();
    assert_eq!(happened.domain, "default_web");
    assert_eq!(happened.change, Change::Suspended { migrating: true });
    assert_eq!(happened.at, Nanos(1_788_256_805_123_000_000));
    assert!(happened.seen >= before && happened.seen <= Nanos::now());
    assert_eq!(virsh.counts.malformed.load(Relaxed), 3);
}

#[tokio::test]
async fn how_it_is_called() {
    let (directory, virsh) = script(
        r#"
        for argument; do echo "$argument"; done > arguments
        echo "$LC_ALL $LIBVIRT_AUTOSTART" > environment
        echo host-7
        exec sleep 1000
        "#,
    );
    let _running = within(connect(&virsh)).await.unwrap();
    let read = |name| fs::read_to_string(directory.path().join(name)).unwrap();
    let arguments = read("arguments");
    let arguments: Vec<&str> = arguments.lines().collect();
    let event = "hostname; event --event lifecycle --loop --timestamp";
    assert_eq!(
        arguments[arguments.len() - 3..],
        ["--connect", "qemu:///system", event]
    );
    assert!(arguments.contains(&"--readonly"), "{arguments:?}");
    assert_eq!(read("environment"), "C 0\n");
}

#[tokio::test]
async fn what_it_says_when_it_ends() {
    let (_directory, virsh) = script(
        "echo host-7; echo 'error: Disconnected due to end of file' >&2; echo more >&2; printf unfinished; exit 1",
    );
    let mut running = within(connect(&virsh)).await.unwrap();
    let error = within(running.next()).await.unwrap_err().to_string();
    assert!(error.contains("Disconnected due to end of file"), "{error}");
    assert!(error.contains('1'), "{error}");
}

#[tokio::test]
async fn one_that_cannot_connect() {
    let (_directory, virsh) =
        script("echo 'error: failed to connect to the hypervisor' >&2; exit 1");
    let error = within(connect(&virsh)).await.err().unwrap().to_string();
    assert!(error.contains("failed to connect"), "{error}");
    let missing = Virsh {
        program: PathBuf::from("/nowhere/virsh"),
        ..virsh
    };
    let error = within(connect(&missing)).await.err().unwrap().to_string();
    assert!(
        error.contains("/nowhere/virsh") && error.contains("--virsh"),
        "{error}"
    );
}

/// More than a pipe holds, which would stop it if nobody read it.
#[tokio::test]
async fn one_that_complains_a_lot_is_heard_all_the_same() {
    let (_directory, virsh) = script(&format!(
        r#"echo host-7; yes complaint | head -c 300000 >&2; echo "{EVENT}"; exec sleep 1000"#
    ));
    let mut running = within(connect(&virsh)).await.unwrap();
    assert_eq!(within(running.next()).await.unwrap().domain, "default_web");
}

/// The clock runs ahead as soon as nothing else happens, so the deadline is reached at once.
#[tokio::test(start_paused = true)]
async fn one_that_hangs_is_given_up_and_leaves_nothing() {
    let (directory, virsh) = script("echo $$ > pid; exec sleep 1000");
    let pid = directory.path().join("pid");
    let error = connect(&virsh).await.err().unwrap();
    assert!(matches!(error, SourceError::Deadline(_)), "{error}");
    tokio::time::resume();
    // It may not have come to that before it was killed.
    until("it is gone", || !pid.exists() || !lives(&pid)).await;
}

#[tokio::test]
async fn what_it_has_started_ends_with_it() {
    let (directory, virsh) =
        script("echo $$ > pid; sleep 1000 & echo $! > child; echo host-7; wait");
    let running = within(connect(&virsh)).await.unwrap();
    let [pid, child] = ["pid", "child"].map(|name| directory.path().join(name));
    assert!(lives(&pid) && lives(&child));
    drop(running);
    until("both are gone", || !lives(&pid) && !lives(&child)).await;
}
