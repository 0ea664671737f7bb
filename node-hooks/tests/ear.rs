//! Listening on a real interface: a host and a guest, each a network namespace, between them a link.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use node_hooks::Nanos;
use node_hooks::ear::{Ear, Heard, HeardFrame, MacAddr, RATE};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);
/// What has not come by then does not come: frames cross a veth in the sender's own system call.
const MOMENT: Duration = Duration::from_millis(300);
const GUEST: [u8; 6] = [0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0a];
const OTHER: [u8; 6] = [0x0a, 0x58, 0x0a, 0x80, 0x01, 0x0b];
const TAP: &str = "tap0";

/// Gone when dropped, with all that is in it.
struct Lab {
    host: String,
    guest: String,
    /// Announcements that were left out.
    missed: Arc<AtomicU64>,
}

/// A socket that sends whole frames.
struct Station(Socket);

impl Lab {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |side: &str| format!("ear-{}-{number}-{side}", std::process::id());
        let lab = Self {
            host: name("host"),
            guest: name("guest"),
            missed: Arc::default(),
        };
        let (host, guest) = (&lab.host, &lab.guest);
        for namespace in [host, guest] {
            ip(&["netns", "add", namespace]);
            // So that the kernel itself says nothing.
            let quiet = "net.ipv6.conf.default.disable_ipv6=1";
            ip(&["netns", "exec", namespace, "sysctl", "-qw", quiet]);
        }
        ip(&[
            "-n", host, "link", "add", TAP, "type", "veth", "peer", "name", "eth0", "netns", guest,
        ]);
        ip(&["-n", host, "link", "set", TAP, "up"]);
        ip(&["-n", guest, "link", "set", "eth0", "up"]);
        lab
    }

    /// Runs in the host, where the ear is.
    fn run<F: Future<Output = ()>>(
        &self,
        test: impl FnOnce(Ear, mpsc::Receiver<HeardFrame>) -> F + Send,
    ) {
        within(&self.host, || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let (sender, heard) = mpsc::channel(4096);
                let missed = self.missed.clone();
                let ear = Ear::listen(TAP, MacAddr::from(GUEST), sender, missed).unwrap();
                // The kernel begins to stamp a little later.
                sleep(Duration::from_millis(50)).await;
                test(ear, heard).await;
            });
        });
    }

    fn station(&self, namespace: &str, interface: &str) -> Station {
        let _ = self;
        within(namespace, || {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).unwrap();
            let index = nix::net::if_::if_nametoindex(interface).unwrap();
            let mut storage = SockAddrStorage::zeroed();
            // SAFETY: sockaddr_ll is one of the platform's sockaddr types, and fits.
            let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
            address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
            address.sll_ifindex = i32::try_from(index).unwrap();
            let length = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
            // SAFETY: the storage holds a sockaddr_ll of that length.
            socket
                .bind(&unsafe { SockAddr::new(storage, length) })
                .unwrap();
            Station(socket)
        })
    }

    fn guest(&self) -> Station {
        self.station(&self.guest, "eth0")
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

impl Station {
    fn send(&self, frame: &[u8]) {
        self.0.send(frame).unwrap();
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {errors}");
}

/// Runs in a namespace, on a thread of its own, as a thread that went there would have to find its way back.
fn within<T: Send>(namespace: &str, run: impl FnOnce() -> T + Send) -> T {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            run()
        });
        inside.join().unwrap()
    })
}

fn frame(source: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &source, &ethertype.to_be_bytes(), payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

fn rarp(source: [u8; 6], mac: [u8; 6]) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 3];
    let packet = [&head[..], &mac, &[0; 4], &mac, &[0; 4]].concat();
    frame(source, 0x8035, &packet)
}

fn garp(operation: u8) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    let address = [10, 128, 1, 10];
    let packet = [&head[..], &GUEST, &address, &[0; 6], &address].concat();
    frame(GUEST, 0x0806, &packet)
}

fn ipv4(source: [u8; 6]) -> Vec<u8> {
    frame(source, 0x0800, &[0x45; 200])
}

async fn next(heard: &mut mpsc::Receiver<HeardFrame>) -> HeardFrame {
    let next = timeout(PATIENCE, heard.recv()).await;
    next.expect("in time").expect("it listens")
}

async fn nothing(heard: &mut mpsc::Receiver<HeardFrame>) {
    let next = timeout(MOMENT, heard.recv()).await;
    assert!(next.is_err(), "{next:?}");
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test ear -- --ignored"]
fn announcements_are_heard_when_they_pass() {
    let lab = Lab::new();
    let (guest, host) = (lab.guest(), lab.station(&lab.host, TAP));
    lab.run(async |_ear, mut heard| {
        for (bytes, expected) in [
            (rarp(GUEST, GUEST), Heard::Rarp),
            (garp(1), Heard::Garp),
            (garp(2), Heard::Garp),
        ] {
            // What goes to the guest, and what is no announcement.
            host.send(&bytes);
            guest.send(&ipv4(GUEST));
            let before = Nanos::now();
            guest.send(&bytes);
            let after = Nanos::now();
            let frame = next(&mut heard).await;
            assert_eq!((frame.heard, frame.own_mac), (expected, true));
            assert_eq!(
                (frame.interface.as_str(), frame.mac),
                (TAP, MacAddr::from(GUEST))
            );
            assert!(
                before <= frame.at && frame.at <= after,
                "{before} {frame:?} {after}"
            );
            assert!(frame.at <= frame.seen);
        }
        nothing(&mut heard).await;
    });
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test ear -- --ignored"]
fn announcements_of_others_are_heard_as_such() {
    let lab = Lab::new();
    let guest = lab.guest();
    lab.run(async |_ear, mut heard| {
        for (source, named) in [(OTHER, OTHER), (GUEST, OTHER), (OTHER, GUEST)] {
            guest.send(&rarp(source, named));
            let frame = next(&mut heard).await;
            assert_eq!((frame.heard, frame.own_mac), (Heard::Rarp, false));
            assert_eq!(frame.mac, MacAddr::from(OTHER));
        }
        // In a VLAN, where the kernel takes the tag off.
        let mut tagged = rarp(GUEST, GUEST);
        tagged.splice(12..12, [0x81, 0, 0, 100]);
        guest.send(&tagged);
        nothing(&mut heard).await;
    });
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test ear -- --ignored"]
fn the_first_frame_is_told_once_each_time_it_is_expected() {
    let lab = Lab::new();
    let guest = lab.guest();
    lab.run(async |ear, mut heard| {
        guest.send(&ipv4(GUEST));
        nothing(&mut heard).await;
        for _ in 0..2 {
            ear.expect_first().unwrap();
            guest.send(&ipv4(OTHER));
            guest.send(&rarp(GUEST, GUEST));
            let before = Nanos::now();
            for _ in 0..100 {
                guest.send(&ipv4(GUEST));
            }
            assert_eq!(next(&mut heard).await.heard, Heard::Rarp);
            let first = next(&mut heard).await;
            assert_eq!((first.heard, first.own_mac), (Heard::Frame, true));
            assert!(first.at >= before && first.at.since(before) < MOMENT);
            nothing(&mut heard).await;
        }
    });
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test ear -- --ignored"]
fn the_last_frame_of_a_guest_that_is_not_too_fast_is_known_exactly() {
    let lab = Lab::new();
    let (guest, host) = (lab.guest(), lab.station(&lab.host, TAP));
    lab.run(async |ear, _heard| {
        assert_eq!(ear.last().frame(), None);
        let mut sent = (Nanos::now(), Nanos::now());
        for _ in 0..300 {
            sent.0 = Nanos::now();
            guest.send(&ipv4(GUEST));
            sent.1 = Nanos::now();
            sleep(Duration::from_millis(1)).await;
        }
        guest.send(&ipv4(OTHER));
        host.send(&ipv4(GUEST));
        for _ in 0..2 {
            let last = ear.last().frame().unwrap();
            assert!(sent.0 <= last.at && last.at <= sent.1, "{sent:?} {last:?}");
            assert_eq!(last.within, Duration::ZERO);
            sleep(MOMENT).await;
        }
    });
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test ear -- --ignored"]
fn the_last_frame_of_a_fast_guest_is_known_about() {
    let lab = Lab::new();
    let guest = lab.guest();
    lab.run(async |ear, _heard| {
        let flood = thread::spawn(move || {
            let (bytes, start) = (ipv4(GUEST), std::time::Instant::now());
            let (mut before, mut after) = (Nanos::now(), Nanos::now());
            while start.elapsed() < Duration::from_secs(1) {
                before = Nanos::now();
                guest.send(&bytes);
                after = Nanos::now();
            }
            (before, after)
        });
        while !flood.is_finished() {
            sleep(Duration::from_millis(10)).await;
        }
        let (before, after) = flood.join().unwrap();
        let last = ear.last().frame().unwrap();
        assert!(last.at <= after, "{last:?} {after}");
        assert!(before.since(last.at) <= last.within, "{last:?} {before}");
        // Once the guest is silent, there is nothing more to be missed.
        sleep(MOMENT).await;
        let later = ear.last().frame().unwrap();
        assert_eq!(later.at, last.at);
        sleep(MOMENT).await;
        assert_eq!(ear.last().frame(), Some(later));
    });
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test ear -- --ignored"]
fn a_flood_of_announcements_is_slowed() {
    let lab = Lab::new();
    let guest = lab.guest();
    lab.run(async |_ear, mut heard| {
        let start = Instant::now();
        for _ in 0..20_000 {
            guest.send(&rarp(GUEST, GUEST));
        }
        sleep(Duration::from_millis(500)).await;
        let mut taken = 0;
        while heard.try_recv().is_ok() {
            taken += 1;
        }
        let most = 64.0 + start.elapsed().as_secs_f64() * f64::from(RATE) + 1.0;
        assert!(f64::from(taken) <= most, "{taken} in {:?}", start.elapsed());
        assert!(taken >= 64, "{taken}");
        // What the kernel dropped is told by the next frame that it did not.
        while lab.missed.load(Ordering::Relaxed) == 0 {
            guest.send(&rarp(GUEST, GUEST));
            next(&mut heard).await;
        }
    });
}

#[test]
#[ignore = "needs root: cargo test -p node-hooks --test ear -- --ignored"]
fn an_interface_that_goes_down_comes_back_and_one_that_is_gone_does_not() {
    let lab = Lab::new();
    let guest = lab.guest();
    lab.run(async |ear, mut heard| {
        ip(&["-n", &lab.host, "link", "set", TAP, "down"]);
        ip(&["-n", &lab.host, "link", "set", TAP, "up"]);
        // A link takes a moment to carry.
        timeout(PATIENCE, async {
            loop {
                let _ = guest.0.send(&rarp(GUEST, GUEST));
                if timeout(Duration::from_millis(50), heard.recv())
                    .await
                    .is_ok()
                {
                    break;
                }
            }
        })
        .await
        .expect("it listens again");
        assert!(!ear.has_ended());
        ip(&["-n", &lab.host, "link", "del", TAP]);
        timeout(PATIENCE, async {
            while !ear.has_ended() {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("it ends");
        while heard.recv().await.is_some() {}
    });
}
