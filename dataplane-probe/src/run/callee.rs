//! Being called: the machine opens everything, as one behind a NAT must, and the client sees where it comes from.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{HELLO_EVERY, RECEIVE_BUFFER, RECEIVE_TIMEOUT};
use crate::clock::realtime_ns;
use crate::sys::{self, Batch, Wait};
use crate::wire::{Body, GREETING, Greeting, MAX_PACKET, Packet, Role};

/// Addresses beyond this many are not told apart: nobody's NAT changes that often.
const KEPT_CALLERS: usize = 64;
/// Between two looks for the stream.
const LOOK: Duration = Duration::from_millis(5);
/// How long a caller may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the reflector calls: a UDP and a TCP socket of one port.
///
/// The sockets stay in the network namespace that they were bound in; the rest of the client may be in another, from
/// where the reflector can be reached.
#[derive(Debug)]
pub struct Callee {
    address: SocketAddr,
    udp: UdpSocket,
    tcp: TcpListener,
}

/// Whom the client has heard, by address.
#[derive(Debug, Default)]
pub(super) struct Callers {
    /// Whom to send to: where the newest packet came from.
    peer: Option<SocketAddr>,
    seen: BTreeMap<IpAddr, Heard>,
}

/// What came from one address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heard {
    pub(super) first_ns: u64,
    pub(super) last_ns: u64,
    pub(super) packets: u64,
    pub(super) connections: u64,
}

/// The client's UDP socket, connected unless it is called.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) socket: UdpSocket,
    pub(super) callers: Option<Arc<Mutex<Callers>>>,
}

impl Callee {
    /// Listens on an address of this machine; with port 0 the system chooses one.
    ///
    /// # Errors
    /// When the address is not this machine's, or the port is taken.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let tcp = TcpListener::bind(address)?;
        let address = tcp.local_addr()?;
        let udp = UdpSocket::bind(address)?;
        sys::observe_receives(udp.as_fd())?;
        sys::set_receive_buffer(udp.as_fd(), RECEIVE_BUFFER)?;
        tcp.set_nonblocking(true)?;
        Ok(Self { address, udp, tcp })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn link(&self) -> io::Result<(Link, Arc<Mutex<Callers>>)> {
        let callers = Arc::default();
        let link = Link {
            socket: self.udp.try_clone()?,
            callers: Some(Arc::clone(&callers)),
        };
        Ok((link, callers))
    }

    pub(super) fn listener(&self) -> io::Result<TcpListener> {
        self.tcp.try_clone()
    }

    /// The stream, once the reflector has dialled; none by the deadline otherwise.
    pub(super) fn stream(
        &self,
        session: u64,
        callers: &Mutex<Callers>,
        deadline: Instant,
    ) -> io::Result<Option<TcpStream>> {
        while Instant::now() < deadline {
            match self.tcp.accept() {
                Ok((connection, from)) => {
                    if let Some(stream) = stream_of(connection, session) {
                        lock(callers).connected(from.ip());
                        return Ok(Some(stream));
                    }
                }
                // Listening sockets have no timeout for this.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(LOOK),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

impl Link {
    /// To the reflector; where it calls, to where it was heard from last.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let peer = self.callers.as_ref().map(|callers| lock(callers).peer);
        match peer {
            None => self.socket.send(bytes),
            Some(Some(peer)) => self.socket.send_to(bytes, peer),
            Some(None) => Err(io::ErrorKind::NotConnected.into()),
        }
        .map(drop)
    }

    /// Whether the session's greeting has come, or comes within a moment.
    pub(super) fn is_greeted(&self, session: u64) -> io::Result<bool> {
        let mut batch = Batch::new(MAX_PACKET);
        self.socket.set_read_timeout(Some(HELLO_EVERY))?;
        let count = batch
            .receive(self.socket.as_fd(), Wait::UntilTimeout)
            .unwrap_or(0);
        self.socket.set_read_timeout(Some(RECEIVE_TIMEOUT))?;
        let ours = Packet {
            session,
            body: Body::Welcome,
        };
        let greeting = batch
            .datagrams(count)
            .find(|datagram| Packet::decode(datagram.bytes) == Ok(ours));
        if let Some(greeting) = &greeting {
            self.heard(greeting.from, greeting.stamp_ns.unwrap_or_else(realtime_ns));
        }
        Ok(greeting.is_some())
    }

    /// Notes where a packet of the session came from.
    pub(super) fn heard(&self, from: Option<SocketAddr>, at_ns: u64) {
        if let (Some(callers), Some(from)) = (&self.callers, from) {
            lock(callers).heard(from, at_ns);
        }
    }
}

impl Callers {
    pub(super) fn seen(&self) -> Vec<(IpAddr, Heard)> {
        let mut seen: Vec<_> = self.seen.iter().map(|(ip, heard)| (*ip, *heard)).collect();
        seen.sort_by_key(|(_, heard)| heard.first_ns);
        seen
    }

    fn heard(&mut self, from: SocketAddr, at_ns: u64) {
        self.peer = Some(from);
        if let Some(heard) = self.entry(from.ip(), at_ns) {
            heard.packets += 1;
        }
    }

    fn connected(&mut self, from: IpAddr) {
        if let Some(heard) = self.entry(from, realtime_ns()) {
            heard.connections += 1;
        }
    }

    fn entry(&mut self, from: IpAddr, at_ns: u64) -> Option<&mut Heard> {
        if !self.seen.contains_key(&from) && self.seen.len() >= KEPT_CALLERS {
            return None;
        }
        let heard = self.seen.entry(from).or_insert(Heard {
            first_ns: at_ns,
            last_ns: at_ns,
            packets: 0,
            connections: 0,
        });
        heard.last_ns = heard.last_ns.max(at_ns);
        Some(heard)
    }
}

/// The connection, if it opens with the session's greeting for a stream.
fn stream_of(mut connection: TcpStream, session: u64) -> Option<TcpStream> {
    let mut bytes = [0; GREETING];
    connection.set_nonblocking(false).ok()?;
    connection.set_read_timeout(Some(PATIENCE)).ok()?;
    connection.read_exact(&mut bytes).ok()?;
    connection.set_read_timeout(None).ok()?;
    connection.set_nodelay(true).ok()?;
    let wanted = Greeting {
        role: Role::Stream,
        session,
    };
    (Greeting::decode(&bytes) == Ok(wanted)).then_some(connection)
}

/// Answers the connections that the reflector opens, until stopped.
pub(super) async fn answer(
    listener: TcpListener,
    session: u64,
    callers: Arc<Mutex<Callers>>,
    mut stopped: watch::Receiver<bool>,
) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
        return;
    };
    let mut answering = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.wait_for(|stop| *stop) => break,
        };
        let Ok((connection, from)) = accepted else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        let callers = Arc::clone(&callers);
        answering.spawn(async move {
            if let Ok(Ok(true)) = timeout(PATIENCE, echo_greeting(connection, session)).await {
                lock(&callers).connected(from.ip());
            }
        });
        while answering.try_join_next().is_some() {}
    }
    while answering.join_next().await.is_some() {}
}

async fn echo_greeting(mut connection: tokio::net::TcpStream, session: u64) -> io::Result<bool> {
    let mut bytes = [0; GREETING];
    connection.read_exact(&mut bytes).await?;
    let wanted = Greeting {
        role: Role::Connect,
        session,
    };
    let is_ours = Greeting::decode(&bytes) == Ok(wanted);
    if is_ours {
        connection.write_all(&bytes).await?;
    }
    Ok(is_ours)
}

pub(super) fn lock(callers: &Mutex<Callers>) -> MutexGuard<'_, Callers> {
    callers.lock().unwrap_or_else(PoisonError::into_inner)
}
