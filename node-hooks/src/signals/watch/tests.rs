//! With a shell script in virsh's place, and real sockets.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::signals::Sign;

const PATIENCE: Duration = Duration::from_secs(30);

/// Prints a host's name and the lines of a file beside the socket that is its standard input, and stays.
const VIRSH: &str = r#"#!/bin/sh
case "$*" in
*socket=/proc/self/fd/0*) directory=$(dirname "$(readlink /proc/self/fd/0)") ;;
*) directory=$(dirname "$0") ;;
esac
echo "$$ $*" >> "$directory/runs"
echo host-7
cat "$directory/events"
exec sleep 1000
"#;

struct Node {
    directory: TempDir,
    config: Config,
}

struct Watching {
    events: mpsc::Receiver<LifecycleEvent>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let virsh = directory.path().join("virsh");
        fs::write(&virsh, VIRSH).unwrap();
        fs::set_permissions(&virsh, fs::Permissions::from_mode(0o755)).unwrap();
        let pattern = format!("{}/pods/*/sock", directory.path().display());
        let config = Config {
            sockets: vec![pattern.parse().unwrap()],
            virsh,
            ..Config::default()
        };
        Self { directory, config }
    }

    /// A launcher's socket, with what is to be told of its guest.
    fn launcher(&self, pod: &str, domain: &str, words: &str) -> (PathBuf, UnixListener) {
        let place = self.directory.path().join("pods").join(pod);
        fs::create_dir_all(&place).unwrap();
        write_event(&place, domain, words);
        let listener = UnixListener::bind(place.join("sock")).unwrap();
        (place, listener)
    }

    fn watch(&self) -> Watching {
        let (sender, events) = mpsc::channel(16);
        let stop = CancellationToken::new();
        let task = tokio::spawn(watch(self.config.clone(), sender, stop.clone()));
        Watching { events, stop, task }
    }
}

impl Watching {
    async fn next(&mut self) -> (String, Sign) {
        let event = timeout(PATIENCE, self.events.recv()).await;
        let event = event.expect("in time").expect("it goes on");
        (event.domain, event.sign)
    }

    async fn stop(self) {
        self.stop.cancel();
        timeout(PATIENCE, self.task)
            .await
            .expect("in time")
            .unwrap();
    }
}

fn write_event(place: &Path, domain: &str, words: &str) {
    let line =
        format!("2026-09-01 10:00:05.123+0000: event 'lifecycle' for domain '{domain}': {words}\n");
    fs::write(place.join("events"), line).unwrap();
}

/// The children that were started for a place, with their arguments.
fn runs(place: &Path) -> Vec<String> {
    let runs = fs::read_to_string(place.join("runs")).unwrap_or_default();
    runs.lines().map(str::to_owned).collect()
}

fn lives(run: &str) -> bool {
    let pid = run.split(' ').next().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| !status.contains("State:\tZ"))
}

/// Waits until no child for a place is left.
async fn gone(place: &Path) {
    let gone = async {
        while runs(place).iter().any(|run| lives(run)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("a child is left");
}

#[tokio::test]
async fn launchers_are_found_as_they_come_and_let_go_as_they_leave() {
    let node = Node::new();
    let (first, _listener) = node.launcher("a", "default_a", "Suspended Migrated");
    let mut watching = node.watch();
    assert_eq!(
        watching.next().await,
        ("default_a".to_owned(), Sign::Paused)
    );
    let (second, listener) = node.launcher("b", "default_b", "Resumed Migrated");
    assert_eq!(
        watching.next().await,
        ("default_b".to_owned(), Sign::Resumed)
    );
    let own =
        |path: &str| path.contains("qemu+unix:///") && path.contains("?socket=/proc/self/fd/0");
    assert!(
        runs(&first).iter().all(|run| own(run)),
        "{:?}",
        runs(&first)
    );
    // The daemon ends, and takes its clients along.
    fs::remove_file(second.join("sock")).unwrap();
    drop(listener);
    let ended = runs(&second)[0].split(' ').next().unwrap().parse().unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(ended),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    // Another one in its place is another launcher.
    write_event(&second, "default_c", "Stopped Migrated");
    let _listener = UnixListener::bind(second.join("sock")).unwrap();
    assert_eq!(watching.next().await, ("default_c".to_owned(), Sign::Left));
    assert_eq!(runs(&first).len(), 1, "the first was left alone");
    watching.stop().await;
    gone(&first).await;
    gone(&second).await;
}

#[tokio::test]
async fn a_daemon_that_is_always_there_is_listened_to_again_when_virsh_ends() {
    let mut node = Node::new();
    node.config.connect_uris = vec!["qemu:///system".to_owned()];
    // What is behind that socket on this machine is none of a test's business.
    node.config.read_only = true;
    let place = node.directory.path().to_owned();
    write_event(&place, "default_a", "Suspended Migrated");
    let mut watching = node.watch();
    assert_eq!(watching.next().await.1, Sign::Paused);
    write_event(&place, "default_a", "Resumed Migrated");
    let first = runs(&place)[0].split(' ').next().unwrap().parse().unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(first),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    assert_eq!(watching.next().await.1, Sign::ResumedAfterFailure);
    assert!(
        runs(&place)[1].contains("--connect qemu:///system"),
        "{:?}",
        runs(&place)
    );
    assert_eq!(node.config.counts.connections.load(Relaxed), 2);
    watching.stop().await;
}

#[tokio::test]
async fn it_ends_when_nobody_listens_and_leaves_no_child() {
    let node = Node::new();
    let (place, _listener) = node.launcher("a", "default_a", "Suspended Migrated");
    let mut watching = node.watch();
    assert_eq!(watching.next().await.1, Sign::Paused);
    drop(watching.events);
    timeout(PATIENCE, watching.task)
        .await
        .expect("in time")
        .unwrap();
    gone(&place).await;
}

/// A daemon that accepts whatever it is called for, and then says this of its guest's monitor.
async fn pass_on(listener: UnixListener, said: Vec<Vec<u8>>) {
    use crate::signals::monitor::tests::reply;
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    for message in [vec![reply(1), reply(2)], said].concat() {
        stream.write_all(&message).await.unwrap();
    }
    // As long as it is listened to.
    stream.read_to_end(&mut Vec::new()).await.unwrap();
}

#[tokio::test]
async fn what_libvirt_passes_on_comes_beside_what_it_says_and_of_one_guest() {
    use crate::signals::monitor::tests::event;
    let node = Node::new();
    let (_place, listener) = node.launcher("a", "default_web", "Resumed Migrated");
    let active = event("MIGRATION", Some(r#"{"status":"active"}"#));
    let daemon = tokio::spawn(pass_on(listener, vec![active, event("STOP", None)]));
    let mut watching = node.watch();
    let mut heard = Vec::new();
    for _ in 0..2 {
        let event = timeout(PATIENCE, watching.events.recv())
            .await
            .unwrap()
            .unwrap();
        heard.push((event.origin, event.sign));
    }
    heard.sort_by_key(|(origin, _)| *origin == Origin::Qmp);
    let expected = [
        (Origin::Libvirt, Sign::Resumed),
        (Origin::Qmp, Sign::Paused),
    ];
    assert_eq!(heard, expected);
    assert_eq!(node.config.counts.connected.load(Relaxed), 1);
    assert_eq!(node.config.counts.monitors.load(Relaxed), 1);
    watching.stop().await;
    timeout(PATIENCE, daemon)
        .await
        .expect("it is let go")
        .unwrap();
}

#[tokio::test]
async fn a_launcher_does_not_speak_of_one_guest_here_and_of_another_there() {
    use crate::signals::monitor::tests::event;
    let node = Node::new();
    let (_place, listener) = node.launcher("a", "default_db", "Resumed Migrated");
    let active = event("MIGRATION", Some(r#"{"status":"active"}"#));
    let _daemon = tokio::spawn(pass_on(listener, vec![active, event("STOP", None)]));
    let mut watching = node.watch();
    watching.next().await;
    let counts = node.config.counts.clone();
    let disbelieved = async {
        while counts.disbelieved.load(Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, disbelieved)
        .await
        .expect("one is not believed");
    watching.stop().await;
}

#[tokio::test]
async fn read_only_nothing_else_is_connected_to() {
    let mut node = Node::new();
    node.config.read_only = true;
    let (_place, listener) = node.launcher("a", "default_web", "Suspended Migrated");
    let mut watching = node.watch();
    assert_eq!(watching.next().await.1, Sign::Paused);
    watching.stop().await;
    listener.set_nonblocking(true).unwrap();
    let error = listener.accept().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}
