//! The reflector: runs in the machine that is measured.
//!
//! One port serves all: UDP packets, and TCP connections whose first bytes say what they are for. One thread for each
//! address does all of UDP and one more all of TCP, so that a machine with one slow processor spends as little as
//! possible on each packet.
//!
//! # Guarantees
//! - Nothing is sent to anybody who has not opened a session over TCP, so a forged source address gains nothing;
//!   unless it [may call](Config::may_call), and then it is a client over TCP who names the address.
//! - At most [`MAX_SESSIONS`] sessions; one that is silent for [`IDLE`] is forgotten.

mod call;
mod session;
mod tcp;
mod udp;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use thiserror::Error;
use tokio::sync::watch;

use crate::sys;
use session::Sessions;

/// How many sessions there can be at a time.
pub const MAX_SESSIONS: usize = 16;
/// How long a session may be silent, on the reflector's clock, before it is forgotten.
pub const IDLE: Duration = Duration::from_mins(2);

/// A sender this far behind does not catch up: the machine did not run, or its clock jumped. What it would have sent
/// in that time was never due by its own clock.
pub const RESCHEDULE: Duration = Duration::from_millis(100);

/// Room for what queues up while the machine is paused and the network is not, or while the machine has better things to
/// do. The kernel doubles it, and counts 2.3 kB for a small packet that came by virtio: some 7,000 of them. More would not
/// help in a small machine, where all of UDP together has about as much (`net.ipv4.udp_mem`).
const RECEIVE_BUFFER: u32 = 8 << 20;
/// How often the receiving threads look whether they should end.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(200);

/// Where to serve.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// The addresses; all of both families when empty.
    pub bind: Vec<IpAddr>,
    /// The port, of UDP and of TCP; 0 lets the system choose one.
    pub port: u16,
    /// Try for real-time priority. Where other things in the machine matter more than the probe, better not.
    pub realtime: bool,
    /// Call whom a client tells it to. Off, unless everybody who reaches the port may make it send anywhere.
    pub may_call: bool,
}

/// Why the reflector cannot serve.
#[derive(Debug, Error)]
pub enum Error {
    /// A socket could not be had.
    #[error(
        "cannot serve {protocol} on {address}; is the port taken, or the address not this machine's?"
    )]
    Bind {
        /// TCP or UDP.
        protocol: &'static str,
        /// Where.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// Neither family is there.
    #[error("this machine has neither IPv4 nor IPv6 sockets")]
    NoFamily,
    /// A thread or the runtime could not be had.
    #[error("cannot start the reflector")]
    Start(#[from] io::Error),
}

/// A running reflector; ends when dropped.
#[derive(Debug)]
pub struct Reflector {
    addresses: Vec<SocketAddr>,
    stop: Arc<AtomicBool>,
    stop_tcp: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
}

impl Reflector {
    /// Binds and serves, in threads of its own.
    ///
    /// With no addresses given, a family that the system does not have is left out.
    pub fn start(config: &Config) -> Result<Self, Error> {
        let pairs = bind(config)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_tcp, stopped) = watch::channel(false);
        let sessions = Arc::new(Sessions::default());
        let realtime = config.realtime;
        let mut addresses = Vec::new();
        let mut threads = Vec::new();
        let mut listeners = Vec::new();
        let mut sockets = session::Sockets::default();
        for (listener, socket) in pairs {
            addresses.push(listener.local_addr()?);
            listeners.push(listener);
            let socket = Arc::new(socket);
            sockets.add(&socket)?;
            let (sessions, stop) = (Arc::clone(&sessions), Arc::clone(&stop));
            threads.push(
                thread::Builder::new()
                    .name("probe-udp".into())
                    .spawn(move || udp::serve(&socket, &sessions, realtime, &stop))?,
            );
        }
        let may_call = config.may_call;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        threads.push(
            thread::Builder::new()
                .name("probe-tcp".into())
                .spawn(move || {
                    prefer(realtime, sys::STREAMS);
                    runtime.block_on(tcp::serve(listeners, sessions, sockets, may_call, stopped));
                })?,
        );
        Ok(Self {
            addresses,
            stop,
            stop_tcp,
            threads,
        })
    }

    /// Where it serves, with the port that the system chose.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }
}

impl Drop for Reflector {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.stop_tcp.send_replace(true);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// Real-time priority for the calling thread, where it is wanted.
fn prefer(realtime: bool, priority: i32) {
    if realtime && !sys::prefer_this_thread(priority) {
        tracing::warn!("real-time priority is not permitted here; it takes CAP_SYS_NICE");
    }
}

type Pair = (TcpListener, UdpSocket);

fn bind(config: &Config) -> Result<Vec<Pair>, Error> {
    let everywhere = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let wanted = if config.bind.is_empty() {
        &everywhere[..]
    } else {
        &config.bind
    };
    let mut pairs: Vec<Pair> = Vec::new();
    let mut port = config.port;
    for &address in wanted {
        match bind_pair(SocketAddr::new(address, port)) {
            Ok(pair) => {
                // The port that the system chose for the first serves for all.
                port = pair.0.local_addr()?.port();
                pairs.push(pair);
            }
            Err(Error::Bind { source, .. })
                if config.bind.is_empty() && family_is_missing(&source) =>
            {
                tracing::info!(%address, "left out: this machine does not have the address family");
            }
            Err(error) => return Err(error),
        }
    }
    if pairs.is_empty() {
        Err(Error::NoFamily)
    } else {
        Ok(pairs)
    }
}

fn family_is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn bind_pair(address: SocketAddr) -> Result<Pair, Error> {
    let failed = |protocol, address| {
        move |source| Error::Bind {
            protocol,
            address,
            source,
        }
    };
    let listener =
        bind_socket(address, Type::STREAM, Protocol::TCP).map_err(failed("TCP", address))?;
    let listener: TcpListener = listener.into();
    let address = listener.local_addr()?;
    let socket =
        bind_socket(address, Type::DGRAM, Protocol::UDP).map_err(failed("UDP", address))?;
    Ok((listener, socket.into()))
}

fn bind_socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(128)?;
        socket.set_nonblocking(true)?;
    } else {
        socket.bind(&address.into())?;
        let reference = SockRef::from(&socket);
        reference.set_read_timeout(Some(RECEIVE_TIMEOUT))?;
        sys::observe_receives(socket.as_fd())?;
        sys::set_receive_buffer(socket.as_fd(), RECEIVE_BUFFER)?;
    }
    Ok(socket)
}

/// Locks, also after a thread panicked while it held the lock: counters stay usable.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
