//! A host with an uplink and two interfaces for VMs, and a neighbour at the other end of the uplink.

use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

const PATIENCE: Duration = Duration::from_secs(20);

/// Two network namespaces; gone when dropped, with all that is in them.
pub(crate) struct Lab {
    pub(crate) host: String,
    pub(crate) peer: String,
}

impl Lab {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |side: &str| format!("nhr-{}-{number}-{side}", std::process::id());
        let lab = Self {
            host: name("host"),
            peer: name("peer"),
        };
        for namespace in [&lab.host, &lab.peer] {
            ip(&format!("netns add {namespace}"));
            ip(&format!("-n {namespace} link set lo up"));
        }
        let peer = &lab.peer;
        lab.ip(&format!(
            "link add up0 type veth peer name eth0 netns {peer}"
        ));
        for (tap, end) in [("tap0", "end0"), ("tap1", "end1")] {
            lab.ip(&format!("link add {tap} type veth peer name {end}"));
            lab.ip(&format!("link set {end} up"));
        }
        for interface in ["up0", "tap0", "tap1"] {
            lab.ip(&format!("link set {interface} up"));
        }
        lab.ip("addr add 10.20.0.1/16 dev up0");
        lab.ip("-6 addr add 2001:db8::1/64 dev up0 nodad");
        ip(&format!("-n {peer} link set eth0 up"));
        ip(&format!("-n {peer} addr add 10.20.0.2/16 dev eth0"));
        ip(&format!(
            "-n {peer} -6 addr add 2001:db8::2/64 dev eth0 nodad"
        ));
        lab
    }

    /// Runs `ip` in the host.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        ip(&format!("-n {} {arguments}", self.host))
    }

    /// Runs in the host, with a runtime.
    pub(crate) fn run<T: Send>(&self, future: impl Future<Output = T> + Send) -> T {
        within(&self.host, || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(future)
        })
    }

    /// Segue's routes, a line each, without spaces at the end.
    pub(crate) fn routes(&self, family: &str) -> Vec<String> {
        let routes = self.ip(&format!("{family} route show proto 115"));
        routes.lines().map(|line| line.trim().to_owned()).collect()
    }

    /// All proxy neighbours.
    pub(crate) fn proxies(&self) -> String {
        self.ip("neigh show proxy")
    }

    /// Has the host answer for others on its uplink, at once.
    pub(crate) fn answer(&self) {
        within(&self.host, || {
            for (setting, value) in [
                ("ipv4/conf/up0/forwarding", "1"),
                ("ipv6/conf/up0/forwarding", "1"),
                ("ipv6/conf/up0/proxy_ndp", "1"),
                ("ipv4/neigh/up0/proxy_delay", "0"),
                ("ipv6/neigh/up0/proxy_delay", "0"),
            ] {
                std::fs::write(format!("/proc/sys/net/{setting}"), value).unwrap();
            }
        });
    }

    /// The Ethernet address of the host's uplink.
    pub(crate) fn mac(&self) -> String {
        let link = self.ip("-o link show up0");
        let mut words = link.split_whitespace();
        words.find(|word| *word == "link/ether").unwrap();
        words.next().unwrap().to_owned()
    }

    /// What the neighbour knows of an address.
    pub(crate) fn known(&self, address: &str) -> String {
        ip(&format!("-n {} neigh show {address} dev eth0", self.peer))
    }

    /// Has the neighbour send something to an address, which takes knowing where it is.
    pub(crate) fn seek(&self, address: IpAddr) {
        within(&self.peer, || {
            let from = if address.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            };
            let socket = UdpSocket::bind(from).unwrap();
            let _ = socket.send_to(b"anybody?", (address, 9));
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for namespace in [&self.host, &self.peer] {
            let _ = Command::new("ip")
                .args(["netns", "del", namespace])
                .status();
        }
    }
}

/// Runs `ip` with arguments that have no spaces in them, which must succeed.
pub(crate) fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
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
