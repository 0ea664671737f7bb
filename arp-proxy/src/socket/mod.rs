//! An interface's frames, in and out.
//!
//! # Guarantees
//! - Nothing is received before the filter is in place, and nothing that the filter should have stopped.
//! - Only what the interface received: not what this host sends.
//! - The interface is never made promiscuous. A hardware filter is told of the groups that questions go to by
//!   `PACKET_MR_MULTICAST`, which the kernel takes back when the socket is closed, however the process ends.

mod filter;
mod sys;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use socket2::{Domain, MaybeUninitSlice, MsgHdrMut, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::Gateway;
use crate::answer::{Tag, groups};

/// More than any question; what is cut is not answered.
const SNAP: usize = 2048;
/// Control messages of a frame: auxiliary data (20 bytes) and a counter (4), each with its header, with room left.
const CONTROL: usize = 128;
/// Some hundred milliseconds of the fastest that is reasonable: what a busy machine may keep this process waiting.
const RECEIVE_BUFFER: i32 = 1 << 20;

/// A socket of one interface.
#[derive(Debug)]
pub(crate) struct PacketSocket {
    socket: AsyncFd<Socket>,
}

/// Where frames are received into.
pub(crate) struct Buffer {
    frame: Box<[MaybeUninit<u8>; SNAP]>,
    control: Box<[MaybeUninit<u8>; CONTROL]>,
}

/// A frame that came in.
#[derive(Debug)]
pub(crate) struct Received<'a> {
    /// From the Ethernet header on, without the tag that the kernel took off.
    pub(crate) bytes: &'a [u8],
    /// That tag.
    pub(crate) tag: Option<Tag>,
    /// It was longer than the buffer, and is cut.
    pub(crate) cut: bool,
    /// Frames that the kernel has dropped so far because this process was too slow.
    pub(crate) dropped: u32,
}

impl PacketSocket {
    /// Opens one of the interface with this index, which need not be up.
    pub(crate) fn open(index: u32, gateway: &Gateway) -> io::Result<Self> {
        let socket = unbound()?;
        let index = i32::try_from(index).map_err(io::Error::other)?;
        socket.set_nonblocking(true)?;
        filter::attach(&socket, &filter::questions())?;
        sys::report(socket.as_fd())?;
        sys::set_receive_buffer(&socket, RECEIVE_BUFFER)?;
        for group in groups(gateway) {
            sys::join(socket.as_fd(), index, group)?;
        }
        sys::bind(&socket, index, libc::ETH_P_ALL)?;
        // Not writable too: every frame that has left would wake the runtime.
        // SAFETY: the socket is owned, and `Socket` keeps its descriptor open and the same.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self { socket })
    }

    /// The next frame. Cancel safe.
    pub(crate) async fn receive<'a>(&self, buffer: &'a mut Buffer) -> io::Result<Received<'a>> {
        let (length, control, cut) = loop {
            let mut ready = self.socket.readable().await?;
            match ready.try_io(|socket| buffer.receive(socket.get_ref())) {
                Ok(received) => break received?,
                Err(_would_block) => {}
            }
        };
        Ok(buffer.received(length, control, cut))
    }

    /// Sends a frame, at once or not at all: who asked asks again, while an answer that comes late helps nobody.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.get_ref().send(frame).map(drop)
    }
}

/// Sends frames on an interface without watching it.
pub(crate) fn send_once(interface: &str, frames: &[Vec<u8>]) -> io::Result<()> {
    let index = sys::index_of(interface)?;
    let socket = unbound()?;
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

impl Buffer {
    pub(crate) fn new() -> Self {
        Self {
            frame: Box::new([MaybeUninit::uninit(); SNAP]),
            control: Box::new([MaybeUninit::uninit(); CONTROL]),
        }
    }

    fn receive(&mut self, socket: &Socket) -> io::Result<(usize, usize, bool)> {
        let mut vector = [MaybeUninitSlice::new(&mut *self.frame)];
        let mut header = MsgHdrMut::new()
            .with_buffers(&mut vector)
            .with_control(&mut *self.control);
        let length = socket.recvmsg(&mut header, 0)?;
        Ok((length, header.control_len(), header.flags().is_truncated()))
    }

    fn received(&self, length: usize, control: usize, cut: bool) -> Received<'_> {
        let frame = self.frame.get(..length).unwrap_or_default();
        let control = self.control.get(..control).unwrap_or_default();
        // SAFETY: the kernel has filled in that much of each.
        let (bytes, control) = unsafe { (frame.assume_init_ref(), control.assume_init_ref()) };
        let told = sys::control_messages(control);
        Received {
            bytes,
            tag: told.tag,
            cut,
            dropped: told.dropped,
        }
    }
}
