//! A relay between client and reflector that harms the traffic in a known way, and knows what it did.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dataplane_probe::clock::{MICROSECOND, monotonic_ns, realtime_ns};
use dataplane_probe::reflect::{self, Reflector};
use dataplane_probe::run::{Config, Outcome, Probe, Progress};
use dataplane_probe::wire::{Body, Data, GREETING, Greeting, Packet, Role};

pub(crate) const PERIOD_MS: f64 = 1.0;

/// What the relay does with a packet of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Pass,
    Drop,
    Twice,
    /// Let the next one overtake it.
    Swap,
    /// Keep it until the time is over.
    Hold(Duration),
}

/// What the relay does with a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TcpFate {
    Relay,
    /// Accept, and close at once.
    Close,
    /// Accept, and never answer.
    Ignore,
    /// Relay, but break it off after so many bytes of echo.
    Break(usize),
    /// Relay, but once, after so many bytes of echo, let nothing through for a while.
    Stall(usize, Duration),
}

type UdpPolicy = Box<dyn FnMut(Data) -> Fate + Send>;
type TcpPolicy = Box<dyn FnMut(Role) -> TcpFate + Send>;

/// What the relay does.
pub(crate) struct Harm {
    pub(crate) to_vm: UdpPolicy,
    pub(crate) from_vm: UdpPolicy,
    pub(crate) tcp: TcpPolicy,
    /// Greetings pass.
    pub(crate) greetings: bool,
}

/// What one direction of the relay really did.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Truth {
    last: Option<(u64, u64)>,
    /// The longest time between two packets passed on: at least, and at most.
    pub(crate) gap_ns: (u64, u64),
    /// The longest time that a packet took from its sender's hands through the relay.
    pub(crate) transit_ns: u64,
}

pub(crate) struct Relay {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    to_vm: Arc<Mutex<Truth>>,
    from_vm: Arc<Mutex<Truth>>,
    front: Arc<UdpSocket>,
    peer: Arc<Mutex<Option<SocketAddr>>>,
    /// How long the stream was really held up.
    pub(crate) held_ns: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Default for Harm {
    fn default() -> Self {
        Self {
            to_vm: Box::new(|_| Fate::Pass),
            from_vm: Box::new(|_| Fate::Pass),
            tcp: Box::new(|_| TcpFate::Relay),
            greetings: true,
        }
    }
}

impl Truth {
    fn passed(&mut self, data: Data, before_ns: u64, after_ns: u64) {
        let due_ns = data.intended_ns + u64::from(data.late_us) * MICROSECOND;
        self.transit_ns = self.transit_ns.max(monotonic_ns().saturating_sub(due_ns));
        if let Some((last_before, last_after)) = self.last.replace((before_ns, after_ns)) {
            let longest = after_ns - last_before;
            if longest > self.gap_ns.1 {
                self.gap_ns = (before_ns.saturating_sub(last_after), longest);
            }
        }
    }
}

pub(crate) fn reflector() -> Reflector {
    Reflector::start(&reflect::Config {
        bind: vec![Ipv4Addr::LOCALHOST.into()],
        port: 0,
        realtime: false,
        may_call: true,
    })
    .expect("loopback is there")
}

/// A short run, without TCP; lateness never makes it invalid, as the machine may be busy.
pub(crate) fn config(target: SocketAddr, packets: u64) -> Config {
    Config {
        duration: Some(Duration::from_millis(packets)),
        stream_every: None,
        connect_every: None,
        max_late: Duration::from_mins(1),
        max_late_reflector: Duration::from_mins(1),
        ..Config::new(target)
    }
}

pub(crate) fn measure(config: Config) -> Outcome {
    let probe = Probe::start(config).expect("the reflector is there");
    let is_over = |_| probe.is_over();
    wait_until(&probe, is_over);
    probe.finish()
}

/// Waits for a run to get somewhere.
pub(crate) fn wait_until(probe: &Probe, there: impl Fn(Progress) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !there(probe.progress()) {
        assert!(
            Instant::now() < deadline,
            "the run does not get there: {:?}",
            probe.progress()
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sleeps a millisecond at a time and notes how much longer it took: how busy the machine is.
pub(crate) struct Canary {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Canary {
    pub(crate) fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut worst_ns = 0;
            while !seen.load(Ordering::Relaxed) {
                let begun = monotonic_ns();
                thread::sleep(Duration::from_millis(1));
                worst_ns = worst_ns.max(monotonic_ns() - begun);
            }
            worst_ns
        });
        Self { stop, thread }
    }

    /// The longest that a millisecond took.
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("it only sleeps")
    }
}

impl Relay {
    pub(crate) fn start(target: SocketAddr, harm: Harm) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback is there");
        let address = listener.local_addr().expect("bound");
        let front = Arc::new(UdpSocket::bind(address).expect("nobody else has this port"));
        let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback is there"));
        back.connect(target).expect("loopback is there");
        for socket in [&front, &back] {
            // What the relay itself dropped while it waits for a processor would be a loss that no test asked for.
            enlarge(socket);
            socket
                .set_read_timeout(Some(Duration::from_millis(20)))
                .expect("a valid timeout");
        }
        let mut relay = Self {
            address,
            stop: Arc::default(),
            to_vm: Arc::default(),
            from_vm: Arc::default(),
            front: Arc::clone(&front),
            peer: Arc::default(),
            held_ns: Arc::default(),
            threads: Vec::new(),
        };
        relay.spawn_udp(&front, &back, harm.to_vm, harm.from_vm, harm.greetings);
        relay.spawn_tcp(listener, target, harm.tcp);
        relay
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn truth_to_vm(&self) -> Truth {
        *lock(&self.to_vm)
    }

    pub(crate) fn truth_from_vm(&self) -> Truth {
        *lock(&self.from_vm)
    }

    /// Sends something of its own to the client.
    pub(crate) fn inject(&self, bytes: &[u8]) {
        let peer = lock(&self.peer).expect("the client has sent something");
        self.front.send_to(bytes, peer).expect("loopback takes it");
    }

    fn spawn_udp(
        &mut self,
        front: &Arc<UdpSocket>,
        back: &Arc<UdpSocket>,
        to_vm: UdpPolicy,
        from_vm: UdpPolicy,
        greetings: bool,
    ) {
        let (peer, forward) = (Arc::clone(&self.peer), Arc::clone(back));
        let send = move |bytes: &[u8]| forward.send(bytes).map(|_| ());
        let learn = move |from| *lock(&peer) = Some(from);
        self.spawn_direction(
            front,
            to_vm,
            greetings,
            Arc::clone(&self.to_vm),
            learn,
            send,
        );
        let (peer, forward) = (Arc::clone(&self.peer), Arc::clone(front));
        let send = move |bytes: &[u8]| match *lock(&peer) {
            Some(peer) => forward.send_to(bytes, peer).map(|_| ()),
            None => Ok(()),
        };
        self.spawn_direction(
            back,
            from_vm,
            greetings,
            Arc::clone(&self.from_vm),
            |_| {},
            send,
        );
    }

    fn spawn_direction(
        &mut self,
        socket: &Arc<UdpSocket>,
        mut policy: UdpPolicy,
        greetings: bool,
        truth: Arc<Mutex<Truth>>,
        learn: impl Fn(SocketAddr) + Send + 'static,
        send: impl Fn(&[u8]) -> io::Result<()> + Send + Sync + 'static,
    ) {
        let (socket, stop, send) = (Arc::clone(socket), Arc::clone(&self.stop), Arc::new(send));
        self.threads.push(thread::spawn(move || {
            let mut buffer = [0; 2048];
            let mut swapped: VecDeque<Vec<u8>> = VecDeque::new();
            let mut held = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                learn(from);
                let bytes = &buffer[..length];
                let body = Packet::decode(bytes).map(|packet| packet.body);
                let Ok(Body::ToVm(data) | Body::FromVm(data, _)) = body else {
                    if greetings {
                        let _ = send(bytes);
                    }
                    continue;
                };
                match policy(data) {
                    Fate::Drop => continue,
                    Fate::Swap => {
                        swapped.push_back(bytes.to_vec());
                        continue;
                    }
                    Fate::Hold(time) => {
                        let (bytes, send) = (bytes.to_vec(), Arc::clone(&send));
                        held.push(thread::spawn(move || {
                            thread::sleep(time);
                            let _ = send(&bytes);
                        }));
                        continue;
                    }
                    Fate::Pass => {}
                    Fate::Twice => {
                        let _ = send(bytes);
                    }
                }
                let before_ns = realtime_ns();
                let _ = send(bytes);
                lock(&truth).passed(data, before_ns, realtime_ns());
                for bytes in swapped.drain(..) {
                    let _ = send(&bytes);
                }
            }
            for thread in held {
                thread.join().expect("it only sleeps and sends");
            }
        }));
    }

    fn spawn_tcp(&mut self, listener: TcpListener, target: SocketAddr, mut policy: TcpPolicy) {
        let (stop, held_ns) = (Arc::clone(&self.stop), Arc::clone(&self.held_ns));
        self.threads.push(thread::spawn(move || {
            // Those that are ignored stay open until the end.
            let mut ignored = Vec::new();
            for connection in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(mut client) = connection else { continue };
                let mut greeting = [0; GREETING];
                if client.read_exact(&mut greeting).is_err() {
                    continue;
                }
                let role = Greeting::decode(&greeting)
                    .expect("only clients come here")
                    .role;
                match policy(role) {
                    TcpFate::Close => {}
                    TcpFate::Ignore => ignored.push(client),
                    fate => {
                        let mut server =
                            TcpStream::connect(target).expect("the reflector is there");
                        server.write_all(&greeting).expect("the reflector is there");
                        for socket in [&client, &server] {
                            socket.set_nodelay(true).expect("it is TCP");
                        }
                        splice(&client, &server, fate, &held_ns);
                    }
                }
            }
        }));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
        for thread in self.threads.drain(..) {
            let result = thread.join();
            if !thread::panicking() {
                result.expect("the relay works");
            }
        }
    }
}

fn splice(client: &TcpStream, server: &TcpStream, fate: TcpFate, held_ns: &Arc<AtomicU64>) {
    let clone = |socket: &TcpStream| socket.try_clone().expect("descriptors are left");
    let (mut up_from, mut up_to) = (clone(client), clone(server));
    thread::spawn(move || {
        let _ = io::copy(&mut up_from, &mut up_to);
        let _ = up_to.shutdown(Shutdown::Write);
    });
    let (mut down_from, mut down_to, held_ns) = (clone(server), clone(client), Arc::clone(held_ns));
    thread::spawn(move || {
        let (mut passed, mut stalled) = (0, false);
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = down_from.read(&mut buffer) {
            match fate {
                TcpFate::Break(after) if passed >= after => {
                    let _ = down_to.shutdown(Shutdown::Both);
                    let _ = down_from.shutdown(Shutdown::Both);
                    return;
                }
                TcpFate::Stall(after, time) if passed >= after && !stalled => {
                    stalled = true;
                    let begun = monotonic_ns();
                    thread::sleep(time);
                    held_ns.store(monotonic_ns() - begun, Ordering::Relaxed);
                }
                _ => {}
            }
            if down_to.write_all(&buffer[..read]).is_err() {
                return;
            }
            passed += read;
        }
        let _ = down_to.shutdown(Shutdown::Write);
    });
}

/// 8 MiB with CAP_NET_ADMIN, otherwise what the system allows.
fn enlarge(socket: &UdpSocket) {
    let bytes: libc::c_int = 8 << 20;
    for option in [libc::SO_RCVBUF, libc::SO_RCVBUFFORCE] {
        // SAFETY: the option's value is an int of the length stated.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const bytes).cast(),
                4,
            )
        };
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread of the relay panics")
}
