//! Namespaces, the program in one of them, and a guest to ask questions from another.

use std::io::{Read, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub(crate) const MAC: &str = "0a:58:a9:fe:01:01";
const PATIENCE: Duration = Duration::from_secs(20);

/// A host and a guest; gone when dropped, with all that is in them.
pub(crate) struct Lab {
    pub(crate) host: String,
    pub(crate) guest: String,
}

/// The program in the host; ended when dropped.
pub(crate) struct Running {
    child: Child,
    directory: TempDir,
}

impl Lab {
    /// Without a link.
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |side: &str| format!("arpp-{}-{number}-{side}", std::process::id());
        let lab = Self {
            host: name("host"),
            guest: name("guest"),
        };
        for namespace in [&lab.host, &lab.guest] {
            ip(&["netns", "add", namespace]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        lab
    }

    /// With the guest's eth0 at the other end of the host's tap0.
    pub(crate) fn linked() -> Self {
        let lab = Self::new();
        lab.link("tap0");
        lab
    }

    /// The guest's eth0, at the other end of the host's `tap`.
    pub(crate) fn link(&self, tap: &str) {
        let (host, guest) = (&self.host, &self.guest);
        ip(&[
            "-n", host, "link", "add", tap, "type", "veth", "peer", "name", "eth0", "netns", guest,
        ]);
        ip(&["-n", host, "link", "set", tap, "up"]);
        ip(&["-n", guest, "link", "set", "eth0", "up"]);
    }

    /// Gives a device of the guest's a /32 and a /128, and the gateway as everything else's.
    pub(crate) fn route(&self, device: &str) {
        let guest = &self.guest;
        for (family, address, gateway) in [
            ("-4", "10.20.1.10/32", "169.254.1.1"),
            ("-6", "2001:db8::10/128", "fe80::1"),
        ] {
            ip(&[
                family, "-n", guest, "addr", "add", address, "dev", device, "nodad",
            ]);
            ip(&[
                family, "-n", guest, "route", "replace", "default", "via", gateway, "dev", device,
                "onlink",
            ]);
        }
    }

    /// Has the guest send something to where only its gateway can bring it, until it knows where that is.
    pub(crate) fn resolve(&self, device: &str) {
        for (outside, gateway) in [("192.0.2.1", "169.254.1.1"), ("2001:db8:1::1", "fe80::1")] {
            let outside: IpAddr = outside.parse().unwrap();
            let what = format!("{gateway} is resolved on {device}");
            until(&what, || {
                send(&self.guest, outside);
                self.neighbour(device, gateway).contains(MAC)
            });
        }
    }

    /// What the guest knows of a neighbour.
    pub(crate) fn neighbour(&self, device: &str, address: &str) -> String {
        ip(&["-n", &self.guest, "neigh", "show", address, "dev", device])
    }

    /// Starts the program in the host, and waits until it watches so many interfaces.
    pub(crate) fn start(&self, arguments: &[&str], watching: &[&str]) -> Running {
        let directory = tempfile::tempdir().unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", &self.host])
            .arg(env!("CARGO_BIN_EXE_arp-proxy"))
            .args(arguments)
            .arg("--control")
            .arg(directory.path().join("control"))
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let running = Running { child, directory };
        running.watches(watching);
        running
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in [&self.host, &self.guest] {
            let _ = Command::new("ip")
                .args(["netns", "del", namespace])
                .status();
        }
    }
}

impl Running {
    /// Waits until it watches exactly these.
    pub(crate) fn watches(&self, interfaces: &[&str]) {
        let expected = format!("ready: watching {}\n", interfaces.join(" "));
        let what = format!("{interfaces:?} are watched");
        until(&what, || {
            self.try_ask("GET", "/readyz")
                .is_some_and(|answer| answer.ends_with(&expected))
        });
    }

    pub(crate) fn ask(&self, method: &str, path: &str) -> String {
        self.try_ask(method, path).expect("it serves")
    }

    fn try_ask(&self, method: &str, path: &str) -> Option<String> {
        let mut stream = UnixStream::connect(self.control()).ok()?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    /// A metric's value; 0 for one that has not been counted yet.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.ask("GET", "/metrics");
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0, |value| value.trim().parse().unwrap())
    }

    pub(crate) fn pid(&self) -> u32 {
        // `ip netns exec` becomes the program.
        self.child.id()
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Ends it, and tells how it ended.
    pub(crate) fn end(mut self, signal: Signal) -> Option<i32> {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap());
        kill(pid, signal).unwrap();
        let status = self.child.wait().unwrap();
        assert!(!self.control().exists(), "the control socket is left");
        status.code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `ip`, which must succeed.
pub(crate) fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn until(what: &str, mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Runs in a namespace, on a thread of its own, as a thread that went there would have to find its way back.
pub(crate) fn within<T: Send>(namespace: &str, run: impl FnOnce() -> T + Send) -> T {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            run()
        });
        inside.join().unwrap()
    })
}

/// Sends a datagram that nobody will answer. That there is no way for it yet is no surprise.
pub(crate) fn send(namespace: &str, to: IpAddr) {
    within(namespace, || {
        let from = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(from).unwrap();
        let _ = socket.send_to(b"anybody?", (to, 9));
    });
}
