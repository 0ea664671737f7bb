//! An interface's frames, in and out.
//!
//! # Guarantees
//! - Nothing is received before the filter is in place, and nothing that the filter should have stopped.
//! - Only what the interface received: not what this host sends.
//! - The interface is never made promiscuous. A hardware filter is told of the groups that questions go to by
//!   `PACKET_MR_MULTICAST`, which the kernel takes back when the socket is closed, however the process ends.

pub mod filter;
mod sys;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use socket2::{Domain, MaybeUninitSlice, MsgHdrMut, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::answer::{Tag, groups};
use crate::{Gateway, Mac};

use filter::Instruction;
pub use sys::{Statistics, index_of};

/// More than any question; what is cut is not answered.
const SNAP: usize = 2048;
/// Control messages of a frame: auxiliary data (20 bytes), a counter (4) and a time (16), each with its header, with
/// room left.
const CONTROL: usize = 192;
/// Some hundred milliseconds of the fastest that is reasonable: what a busy machine may keep this process waiting.
const RECEIVE_BUFFER: i32 = 1 << 20;

/// What a socket is to receive, and how.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// What the kernel lets through; it has to drop [`filter::OUTGOING`] itself, as old kernels know no other way.
    pub filter: &'a [Instruction],
    /// Bytes of the kernel's memory for what has not been read yet; without `CAP_NET_ADMIN` at most
    /// `net.core.rmem_max`.
    pub receive_buffer: i32,
    /// Groups that the interface's hardware is to let in.
    pub groups: &'a [Mac],
    /// Have the kernel stamp the frames. It then stamps all that the machine receives, some ten nanoseconds each.
    pub stamps: bool,
}

/// A socket of one interface that never waits.
#[derive(Debug)]
pub struct RawSocket(Socket);

/// A socket of one interface that can be waited for.
#[derive(Debug)]
pub struct PacketSocket {
    socket: AsyncFd<RawSocket>,
}

/// Where frames are received into.
#[derive(Debug)]
pub struct Buffer {
    frame: Box<[MaybeUninit<u8>; SNAP]>,
    control: Box<[MaybeUninit<u8>; CONTROL]>,
}

/// A frame that came in.
#[derive(Debug)]
pub struct Received<'a> {
    /// From the Ethernet header on, without the tag that the kernel took off.
    pub bytes: &'a [u8],
    /// That tag.
    pub tag: Option<Tag>,
    /// It was longer than the buffer, and is cut.
    pub cut: bool,
    /// Frames that the kernel has dropped so far because this process was too slow.
    pub dropped: u32,
    /// When it passed the interface, in nanoseconds of Unix time, if the kernel was asked to stamp.
    pub stamp: Option<u64>,
}

/// How much of the buffer a frame has filled.
struct Filled {
    frame: usize,
    control: usize,
    cut: bool,
}

impl RawSocket {
    /// Opens one of the interface with this index, which need not be up.
    pub fn open(index: u32, options: &Options<'_>) -> io::Result<Self> {
        let socket = unbound()?;
        let index = i32::try_from(index).map_err(io::Error::other)?;
        socket.set_nonblocking(true)?;
        filter::attach(&socket, options.filter)?;
        sys::report(socket.as_fd())?;
        if options.stamps {
            sys::stamp(socket.as_fd())?;
        }
        sys::set_receive_buffer(&socket, options.receive_buffer)?;
        for &group in options.groups {
            sys::join(socket.as_fd(), index, group)?;
        }
        sys::bind(&socket, index, libc::ETH_P_ALL)?;
        Ok(Self(socket))
    }

    /// The next frame that has come.
    ///
    /// # Errors
    /// `WouldBlock` if none has.
    pub fn receive<'a>(&self, buffer: &'a mut Buffer) -> io::Result<Received<'a>> {
        let filled = buffer.fill(&self.0)?;
        Ok(buffer.received(&filled))
    }

    /// Puts another filter in place, in one step. What the old one let through is still there to be read.
    pub fn set_filter(&self, filter: &[Instruction]) -> io::Result<()> {
        filter::attach(&self.0, filter)
    }

    /// What the kernel has counted since this was called last.
    pub fn statistics(&self) -> io::Result<Statistics> {
        sys::statistics(self.0.as_fd())
    }
}

impl std::os::fd::AsRawFd for RawSocket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl PacketSocket {
    /// Has the runtime wait for a socket's frames. It wakes up for every one of them.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(socket: RawSocket) -> io::Result<Self> {
        // Not writable too: every frame that has left would wake the runtime.
        // SAFETY: the socket is owned, and `Socket` keeps its descriptor open and the same.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self { socket })
    }

    /// Opens one for questions about the gateway.
    pub(crate) fn open(index: u32, gateway: &Gateway) -> io::Result<Self> {
        let options = Options {
            filter: &filter::questions(),
            receive_buffer: RECEIVE_BUFFER,
            groups: &groups(gateway),
            stamps: false,
        };
        Self::new(RawSocket::open(index, &options)?)
    }

    /// The next frame. Cancel safe.
    pub async fn receive<'a>(&self, buffer: &'a mut Buffer) -> io::Result<Received<'a>> {
        let filled = loop {
            let mut ready = self.socket.readable().await?;
            match ready.try_io(|socket| buffer.fill(&socket.get_ref().0)) {
                Ok(filled) => break filled?,
                Err(_would_block) => {}
            }
        };
        Ok(buffer.received(&filled))
    }

    /// As [`RawSocket::set_filter`].
    pub fn set_filter(&self, filter: &[Instruction]) -> io::Result<()> {
        self.socket.get_ref().set_filter(filter)
    }

    /// Sends a frame, at once or not at all: who asked asks again, while an answer that comes late helps nobody.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.get_ref().0.send(frame).map(drop)
    }
}

/// Sends frames on an interface without watching it.
pub(crate) fn send_once(interface: &str, frames: &[Vec<u8>]) -> io::Result<()> {
    let index = sys::index_of(interface)?;
    let socket = unbound()?;
    let index = i32::try_from(index).map_err(io::Error::other)?;
    // Bound to no protocol it receives nothing.
    sys::bind(&socket, index, 0)?;
    frames
        .iter()
        .try_for_each(|frame| socket.send(frame).map(drop))
}

/// Whether this process may have packet sockets at all.
pub(crate) fn permitted() -> io::Result<()> {
    unbound().map(drop)
}

/// Of protocol 0, which receives nothing until it is bound to another.
fn unbound() -> io::Result<Socket> {
    Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))
}

impl Default for Buffer {
    fn default() -> Self {
        Self::new()
    }
}

impl Buffer {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            frame: Box::new([MaybeUninit::uninit(); SNAP]),
            control: Box::new([MaybeUninit::uninit(); CONTROL]),
        }
    }

    fn fill(&mut self, socket: &Socket) -> io::Result<Filled> {
        let mut vector = [MaybeUninitSlice::new(&mut *self.frame)];
        let mut header = MsgHdrMut::new()
            .with_buffers(&mut vector)
            .with_control(&mut *self.control);
        let frame = socket.recvmsg(&mut header, 0)?;
        Ok(Filled {
            frame,
            control: header.control_len(),
            cut: header.flags().is_truncated(),
        })
    }

    fn received(&self, filled: &Filled) -> Received<'_> {
        let frame = self.frame.get(..filled.frame).unwrap_or_default();
        let control = self.control.get(..filled.control).unwrap_or_default();
        // SAFETY: the kernel has filled in that much of each.
        let (bytes, control) = unsafe { (frame.assume_init_ref(), control.assume_init_ref()) };
        let told = sys::control_messages(control);
        Received {
            bytes,
            tag: told.tag,
            cut: filled.cut,
            dropped: told.dropped,
            stamp: told.stamp,
        }
    }
}
