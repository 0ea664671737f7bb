//! A guest that migrates between two real QEMUs without libvirt.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use node_hooks::signals::{Config, LifecycleEvent, Origin, Sign, watch};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_mins(1);
const DOMAIN: &str = "default_web";

/// Ended when dropped.
struct Qemu {
    child: Child,
    control: BufReader<UnixStream>,
}

impl Qemu {
    /// With one monitor for the agent and one for the test.
    fn start(directory: &Path, side: &str, arguments: &[&str]) -> Self {
        let program =
            std::env::var("SEGUE_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
        let monitor = |of: &str| {
            format!(
                "unix:{}/{side}.{of},server=on,wait=off",
                directory.display()
            )
        };
        let child = Command::new(&program)
            .args([
                "-machine",
                "pc,accel=tcg",
                "-m",
                "32",
                "-nodefaults",
                "-display",
                "none",
            ])
            .args(["-name", DOMAIN])
            .args(["-qmp", &monitor("agent"), "-qmp", &monitor("control")])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program} (SEGUE_QEMU names another): {error}"));
        let path = directory.join(format!("{side}.control"));
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let mut qemu = Self {
            child,
            control: BufReader::new(stream),
        };
        qemu.execute("qmp_capabilities", &json!({}));
        qemu
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.control.get_mut(), "{request}").unwrap();
        loop {
            let mut line = String::new();
            self.control.read_line(&mut line).unwrap();
            let message: Value = serde_json::from_str(&line).unwrap();
            if let Some(reply) = message.get("return") {
                return reply.clone();
            }
            assert!(message.get("error").is_none(), "{command}: {message}");
        }
    }

    fn migrate(&mut self, to: &str) {
        self.execute("migrate", &json!({"uri": to}));
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn next(events: &mut mpsc::Receiver<LifecycleEvent>) -> LifecycleEvent {
    let event = timeout(PATIENCE, events.recv()).await;
    let event = event.expect("in time").expect("it goes on");
    assert_eq!((event.domain.as_str(), event.origin), (DOMAIN, Origin::Qmp));
    event
}

#[tokio::test]
#[ignore = "needs qemu-system-x86_64: cargo test -p node-hooks --test qmp -- --ignored"]
async fn a_guest_fails_to_leave_and_leaves_then() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let config = Config {
        qmp: vec![format!("{}/*.agent", directory.display()).parse().unwrap()],
        ..Config::default()
    };
    let counts = config.counts.clone();
    let (sender, mut events) = mpsc::channel(16);
    let stop = CancellationToken::new();
    let watching = tokio::spawn(watch(config, sender, stop.clone()));
    let incoming = format!("unix:{}/incoming", directory.display());
    let mut source = Qemu::start(directory, "source", &[]);
    let mut target = Qemu::start(directory, "target", &["-incoming", &incoming]);
    timeout(PATIENCE, async {
        while counts.connected.load(std::sync::atomic::Ordering::Relaxed) < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("both are heard");

    // A person's pause is none of a migration.
    source.execute("stop", &json!({}));
    source.execute("cont", &json!({}));
    // Everything is copied, and then who takes it fails.
    source.migrate("exec:cat >/dev/null; exit 1");
    let paused = next(&mut events).await;
    assert_eq!(paused.sign, Sign::Paused);
    assert!(paused.at <= paused.seen);
    timeout(PATIENCE, async {
        while source.execute("query-migrate", &json!({}))["status"] != "completed" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("all is copied");
    source.execute("cont", &json!({}));
    assert_eq!(next(&mut events).await.sign, Sign::ResumedAfterFailure);

    source.migrate(&incoming);
    let paused = next(&mut events).await;
    let resumed = next(&mut events).await;
    assert_eq!((paused.sign, resumed.sign), (Sign::Paused, Sign::Resumed));
    assert!(paused.at < resumed.at, "{paused:?} {resumed:?}");
    source.execute("quit", &json!({}));
    assert_eq!(next(&mut events).await.sign, Sign::Left);
    target.execute("stop", &json!({}));
    drop(target);
    assert_eq!(events.try_recv().ok(), None);
    stop.cancel();
    watching.await.unwrap();
}
