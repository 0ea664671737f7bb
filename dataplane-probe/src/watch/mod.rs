//! Watches an interface for the frames that tell where a machine is.
//!
//! After a migration a machine (or its hypervisor) announces itself: by RARP, by gratuitous ARP, by unsolicited
//! neighbour advertisements. On the machine's tap a frame that the machine sent comes *in*; one that goes *out* was
//! delivered to it.
//!
//! # Guarantees
//! - Timestamps are the kernel's, taken when the frame passed the interface.
//! - The interface is never made promiscuous, and frames of no interest are filtered out in the kernel.
//! - What was not seen is known: frames that found no room in the socket's buffer are counted, and an interface that
//!   went away ends the watch, also where another of its name has come.
//!
//! # Caveats
//! A VLAN tag that the kernel took off is not seen; frames are told by the type behind it.

mod filter;
mod frame;

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};
use thiserror::Error;

use crate::clock::{SECOND, realtime_ns};
use crate::sys::{self, Batch, Datagram, Wait};
pub use frame::{Kind, Mac, MacError};

/// Enough of a frame to tell its kind.
const SNAP: usize = 128;
/// How often it is looked whether to stop.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(100);
/// How often it is looked whether an interface that was down is still there.
const LOOK: Duration = Duration::from_millis(5);
/// Room for what passes while the watcher waits for a processor.
const BUFFER: u32 = 4 << 20;
/// `PACKET_OUTGOING` as `sll_pkttype` has it.
const OUTGOING: u8 = libc::PACKET_OUTGOING;

/// What to watch.
#[derive(Debug, Clone)]
pub struct Config {
    /// The interface.
    pub interface: String,
    /// Only frames with this source address.
    pub mac: Option<Mac>,
    /// Only UDP and TCP to this port, every packet of it.
    pub port: Option<u16>,
    /// Every frame, instead of the interesting ones and the first in each direction.
    pub all: bool,
}

/// Why an interface cannot be watched.
#[derive(Debug, Error)]
pub enum Error {
    /// It is not there.
    #[error(
        "there is no interface {interface} in this network namespace; `ip link` lists those there are"
    )]
    NoInterface {
        /// Its name.
        interface: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Not allowed, most likely.
    #[error("cannot watch {interface} (it takes CAP_NET_RAW)")]
    Open {
        /// Its name.
        interface: String,
        /// The system's answer.
        source: io::Error,
    },
    /// It went away.
    #[error("{interface} is gone")]
    Gone {
        /// Its name.
        interface: String,
    },
    /// The socket fails.
    #[error("cannot watch {interface} any longer")]
    Receive {
        /// Its name.
        interface: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// From now on nothing is missed.
    Ready {
        /// The interface.
        interface: String,
        /// Wall clock, nanoseconds.
        t_ns: u64,
    },
    /// A frame.
    Frame {
        /// When it passed the interface: wall clock, nanoseconds.
        t_ns: u64,
        /// Which way.
        direction: Direction,
        /// What it is.
        kind: Kind,
        /// Its EtherType, as in `0x8035`.
        ethertype: String,
        /// Its source address.
        source: Mac,
        /// Its destination address.
        destination: Mac,
        /// Its IP protocol, as in 17 for UDP, if it is IP; of IPv6 the header behind the first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        protocol: Option<u8>,
        /// Its length, without a VLAN tag that the kernel took off.
        bytes: usize,
        /// The first in this direction since watching began.
        first: bool,
    },
    /// The interface is down; watching goes on and sees what comes when it is up again.
    Down {
        /// The interface.
        interface: String,
        /// Wall clock, nanoseconds.
        t_ns: u64,
    },
}

/// Which way a frame went, as the interface sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Received by the interface; on a tap: sent by the machine behind it.
    In,
    /// Sent out of the interface; on a tap: delivered to the machine.
    Out,
}

/// An open watch.
#[derive(Debug)]
pub struct Watcher {
    config: Config,
    index: i32,
    socket: Socket,
    /// It was down once. The kernel tells of an interface that goes only that it is down, and then nothing more.
    was_down: bool,
    dropped: u64,
    batch: Batch,
    seen: [bool; 2],
    opened_ns: u64,
    stop: Arc<AtomicBool>,
}

/// Ends a watch from another thread.
#[derive(Debug, Clone)]
pub struct StopHandle(Arc<AtomicBool>);

impl Watcher {
    /// Opens the socket, filter first, so that not one frame that should be filtered is seen, nor one missed after.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let interface = || config.interface.clone();
        let index = index_of(&config.interface).map_err(|source| Error::NoInterface {
            interface: interface(),
            source,
        })?;
        let socket = open(config, index).map_err(|source| {
            let interface = interface();
            // It went away since it was looked up.
            if source.raw_os_error() == Some(libc::ENODEV) {
                Error::NoInterface { interface, source }
            } else {
                Error::Open { interface, source }
            }
        })?;
        Ok(Self {
            config: config.clone(),
            index,
            socket,
            was_down: false,
            dropped: 0,
            batch: Batch::new(SNAP),
            seen: [false; 2],
            opened_ns: realtime_ns(),
            stop: Arc::default(),
        })
    }

    /// What to tell first.
    pub fn ready(&self) -> Event {
        Event::Ready {
            interface: self.config.interface.clone(),
            t_ns: self.opened_ns,
        }
    }

    /// For another thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.stop))
    }

    /// How many frames that it should have told of found no room in the socket's buffer since watching began.
    ///
    /// # Errors
    /// When the socket does not say.
    pub fn dropped(&mut self) -> Result<u64, Error> {
        let dropped = sys::packet_drops(self.socket.as_fd());
        let dropped = dropped.map_err(|source| self.fails(source))?;
        self.dropped += u64::from(dropped);
        Ok(self.dropped)
    }

    /// What has happened in the next tenth of a second or so; none once it was stopped.
    ///
    /// # Errors
    /// [`Error::Gone`] where the interface went away; any other means that frames may have passed unseen.
    pub fn poll(&mut self) -> Result<Option<Vec<Event>>, Error> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let wait = if self.was_down {
            Wait::No
        } else {
            Wait::UntilTimeout
        };
        let count = match self.batch.receive(self.socket.as_fd(), wait) {
            Ok(count) => count,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                if self.was_down {
                    // All that came before has been told of.
                    self.still_there()?;
                    thread::sleep(LOOK);
                }
                0
            }
            Err(error) if error.kind() == io::ErrorKind::NetworkDown => {
                self.was_down = true;
                return Ok(Some(vec![Event::Down {
                    interface: self.config.interface.clone(),
                    t_ns: realtime_ns(),
                }]));
            }
            Err(source) => return Err(self.fails(source)),
        };
        let before = self.seen;
        let every = self.config.all || self.config.port.is_some();
        let seen = &mut self.seen;
        let frames = self.batch.datagrams(count);
        let events = frames
            .filter_map(|frame| tell(&frame, seen, every))
            .collect();
        if !every && before != self.seen {
            let [seen_in, seen_out] = self.seen;
            let unseen = filter::Unseen {
                incoming: !seen_in,
                outgoing: !seen_out,
            };
            filter::attach(&self.socket, &filter::interesting(self.config.mac, unseen))
                .map_err(|source| self.fails(source))?;
        }
        Ok(Some(events))
    }

    /// Down is passing; gone is not, and another interface of the same name is not the one that is watched.
    fn still_there(&self) -> Result<(), Error> {
        let interface = &self.config.interface;
        match index_of(interface) {
            Ok(index) if index == self.index => Ok(()),
            _ => Err(Error::Gone {
                interface: interface.clone(),
            }),
        }
    }

    fn fails(&self, source: io::Error) -> Error {
        Error::Receive {
            interface: self.config.interface.clone(),
            source,
        }
    }
}

impl StopHandle {
    /// [`Watcher::poll`] returns none within a tenth of a second.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Event {
    /// A frame, the first that came in.
    pub fn is_first_in(&self) -> bool {
        matches!(
            self,
            Self::Frame {
                first: true,
                direction: Direction::In,
                ..
            }
        )
    }
}

impl fmt::Display for Event {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready { interface, t_ns } => write!(out, "{} watching {interface}", Time(*t_ns)),
            Self::Down { interface, t_ns } => write!(out, "{} {interface} is down", Time(*t_ns)),
            Self::Frame {
                t_ns,
                direction,
                kind,
                ethertype,
                source,
                destination,
                protocol: _,
                bytes,
                first,
            } => {
                let way = if *direction == Direction::In {
                    "in "
                } else {
                    "out"
                };
                let first = if *first { ", the first" } else { "" };
                write!(
                    out,
                    "{} {way} {source} > {destination} {kind} ({ethertype}), {bytes} bytes{first}",
                    Time(*t_ns)
                )
            }
        }
    }
}

/// Seconds since the epoch; a person compares them, nobody needs a calendar.
struct Time(u64);

impl fmt::Display for Time {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{:09}", self.0 / SECOND, self.0 % SECOND)
    }
}

fn tell(datagram: &Datagram<'_>, seen: &mut [bool; 2], all: bool) -> Option<Event> {
    let frame = frame::parse(datagram.bytes)?;
    let (direction, seen) = match datagram.packet_type {
        Some(OUTGOING) => (Direction::Out, &mut seen[1]),
        _ => (Direction::In, &mut seen[0]),
    };
    let first = !std::mem::replace(seen, true);
    (all || first || frame.kind.is_announcement()).then(|| Event::Frame {
        t_ns: datagram.stamp_ns.unwrap_or_else(realtime_ns),
        direction,
        kind: frame.kind,
        protocol: frame.protocol,
        ethertype: format!("0x{:04x}", frame.ethertype),
        source: frame.source,
        destination: frame.destination,
        bytes: datagram.whole,
        first,
    })
}

fn index_of(interface: &str) -> io::Result<i32> {
    let name = CString::new(interface).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: `name` is a C string that outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => i32::try_from(index).map_err(io::Error::other),
    }
}

fn open(config: &Config, index: i32) -> io::Result<Socket> {
    // Protocol 0 receives nothing until the socket is bound to one, with the filter in place.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    let everything = filter::Unseen {
        incoming: true,
        outgoing: true,
    };
    let wanted = match config.port {
        Some(port) => filter::to_port(port),
        None => filter::interesting(config.mac, everything),
    };
    filter::attach(&socket, &wanted)?;
    socket.set_read_timeout(Some(RECEIVE_TIMEOUT))?;
    sys::set_receive_buffer(socket.as_fd(), BUFFER)?;
    sys::observe_receives(socket.as_fd())?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is one of the platform's sockaddr types, and fits.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET
        .unsigned_abs()
        .try_into()
        .map_err(io::Error::other)?;
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL)
        .map_err(io::Error::other)?
        .to_be();
    address.sll_ifindex = index;
    let length =
        libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)?;
    // SAFETY: the storage holds a sockaddr_ll of that length.
    socket.bind(&unsafe { SockAddr::new(storage, length) })?;
    Ok(socket)
}
