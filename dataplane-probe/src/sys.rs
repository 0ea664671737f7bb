//! The Linux calls that the standard library and socket2 do not have. All of the crate's `unsafe` for sockets is here.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use socket2::SockAddr;

use crate::clock::SECOND;

/// Datagrams taken with one system call.
const BATCH: usize = 32;

/// Control messages of one datagram: a timestamp (16 bytes) and a counter (4), each with its header, with room left.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 128]);

/// A place to receive datagrams in batches, together with their kernel timestamps.
pub(crate) struct Batch {
    buffers: Vec<u8>,
    size: usize,
    names: [libc::sockaddr_storage; BATCH],
    controls: [Control; BATCH],
    /// Of each datagram: its length, which is more than `size` if it was cut, and that of its control messages.
    lengths: [(usize, usize); BATCH],
}

/// What to do when no datagram is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Fail at once.
    No,
    /// Wait for as long as the socket's receive timeout says.
    UntilTimeout,
}

/// One datagram of a [`Batch`].
#[derive(Debug)]
pub(crate) struct Datagram<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) from: Option<SocketAddr>,
    /// When the kernel took it from the interface, `CLOCK_REALTIME`.
    pub(crate) stamp_ns: Option<u64>,
    /// How many datagrams the socket has dropped so far for lack of buffer space.
    pub(crate) overflow: Option<u32>,
    /// `msg_name` in the form of `AF_PACKET`, of which only the packet type is of use here.
    pub(crate) packet_type: Option<u8>,
    /// Its length on the wire, which is more than that of `bytes` if it was cut.
    pub(crate) whole: usize,
}

impl Batch {
    /// How many datagrams it takes at once.
    pub(crate) const CAPACITY: usize = BATCH;

    /// Room for datagrams of up to `size` bytes; longer ones are cut.
    pub(crate) fn new(size: usize) -> Self {
        Self {
            buffers: vec![0; size * BATCH],
            size,
            // SAFETY: an all-zero sockaddr_storage is valid: of no family.
            names: [unsafe { zeroed() }; BATCH],
            controls: [Control([0; 128]); BATCH],
            lengths: [(0, 0); BATCH],
        }
    }

    /// Takes all datagrams that are there, up to the capacity; if there is none, waits for one as told.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>, wait: Wait) -> io::Result<usize> {
        // SAFETY: all-zero iovecs and mmsghdrs are valid: null pointers with zero lengths.
        let (mut vectors, mut headers): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) =
            unsafe { (zeroed(), zeroed()) };
        let places = self
            .buffers
            .chunks_exact_mut(self.size)
            .zip(&mut self.names)
            .zip(&mut self.controls);
        for ((header, vector), ((buffer, name), control)) in
            headers.iter_mut().zip(&mut vectors).zip(places)
        {
            *vector = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = length(size_of::<libc::sockaddr_storage>());
            header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = size_of::<Control>();
        }
        // SAFETY: every header points to buffers of the stated lengths that live in `self` or above, and nothing else
        // touches them during the call.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                length(BATCH),
                libc::MSG_TRUNC
                    | if wait == Wait::No {
                        libc::MSG_DONTWAIT
                    } else {
                        libc::MSG_WAITFORONE
                    },
                std::ptr::null_mut(),
            )
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (lengths, header) in self.lengths.iter_mut().zip(&headers).take(received) {
            *lengths = (header.msg_len as usize, header.msg_hdr.msg_controllen);
        }
        Ok(received)
    }

    /// The `count` datagrams of the last [`Batch::receive`].
    pub(crate) fn datagrams(&self, count: usize) -> impl Iterator<Item = Datagram<'_>> {
        let places = self
            .buffers
            .chunks_exact(self.size)
            .zip(&self.names)
            .zip(&self.controls);
        self.lengths.iter().zip(places).take(count).map(
            |(&(whole, control), ((buffer, storage), controls))| {
                let mut datagram = Datagram {
                    bytes: &buffer[..whole.min(self.size)],
                    from: None,
                    stamp_ns: None,
                    overflow: None,
                    packet_type: None,
                    whole,
                };
                name(storage, &mut datagram);
                control_messages(
                    &controls.0[..control.min(size_of::<Control>())],
                    &mut datagram,
                );
                datagram
            },
        )
    }
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Batch")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

fn name(storage: &libc::sockaddr_storage, datagram: &mut Datagram<'_>) {
    let storage = std::ptr::from_ref(storage);
    // SAFETY: each of the three is plain integers, smaller than the storage and no more aligned than it.
    unsafe {
        match i32::from((*storage).ss_family) {
            libc::AF_INET => {
                let v4 = &*storage.cast::<libc::sockaddr_in>();
                datagram.from =
                    Some((v4.sin_addr.s_addr.to_ne_bytes(), u16::from_be(v4.sin_port)).into());
            }
            libc::AF_INET6 => {
                let v6 = &*storage.cast::<libc::sockaddr_in6>();
                let address = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                let port = u16::from_be(v6.sin6_port);
                // The scope is what makes a link-local address answerable.
                datagram.from = Some(SocketAddrV6::new(address, port, 0, v6.sin6_scope_id).into());
            }
            libc::AF_PACKET => {
                datagram.packet_type = Some((*storage.cast::<libc::sockaddr_ll>()).sll_pkttype);
            }
            _ => {}
        }
    }
}

fn control_messages(mut rest: &[u8], datagram: &mut Datagram<'_>) {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    // Read as bytes rather than with CMSG_NXTHDR, so that no length, however odd, leads out of the buffer.
    while rest.len() >= HEADER {
        // SAFETY: at least a cmsghdr's bytes are there, and any bytes are a valid one; read_unaligned needs no more.
        let head = unsafe { rest.as_ptr().cast::<libc::cmsghdr>().read_unaligned() };
        let Some(data) = rest.get(HEADER..head.cmsg_len) else {
            return;
        };
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_TIMESTAMPNS {
            let field = |at: usize| {
                data.get(at..)
                    .and_then(<[u8]>::first_chunk)
                    .map(|&chunk| u64::from_ne_bytes(chunk))
            };
            datagram.stamp_ns = field(0)
                .zip(field(8))
                .map(|(seconds, nanos)| seconds * SECOND + nanos);
        } else if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SO_RXQ_OVFL {
            datagram.overflow = data.first_chunk().map(|&chunk| u32::from_ne_bytes(chunk));
        }
        rest = rest
            .get(head.cmsg_len.next_multiple_of(align_of::<usize>())..)
            .unwrap_or_default();
    }
}

/// Asks for kernel receive timestamps and for the count of datagrams dropped at the socket.
pub(crate) fn observe_receives(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_flag(socket, libc::SO_TIMESTAMPNS)?;
    set_flag(socket, libc::SO_RXQ_OVFL)
}

/// How many frames that passed its filter a packet socket has dropped for lack of buffer space since this was last
/// asked: `PACKET_STATISTICS`, packet(7).
pub(crate) fn packet_drops(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut size = length(size_of::<libc::tpacket_stats>());
    // SAFETY: `statistics` has room for `size` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut size,
        )
    };
    if result == 0 {
        Ok(statistics.tp_drops)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Asks for a receive buffer of `bytes`: beyond `net.core.rmem_max` with `CAP_NET_ADMIN`, otherwise up to it.
pub(crate) fn set_receive_buffer(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    set_option(socket, libc::SO_RCVBUFFORCE, bytes)
        .or_else(|_| set_option(socket, libc::SO_RCVBUF, bytes))
}

/// Segments that TCP has retransmitted on a connection so far (`tcpi_total_retrans`).
pub(crate) fn total_retransmits(socket: BorrowedFd<'_>) -> Option<u64> {
    // SAFETY: an all-zero tcp_info is valid; kernels that fill in less leave the rest zero.
    let mut info: libc::tcp_info = unsafe { zeroed() };
    let mut size = length(size_of::<libc::tcp_info>());
    // SAFETY: `info` has room for `size` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    (result == 0).then_some(u64::from(info.tcpi_total_retrans))
}

/// Sends a datagram without waiting, from the local address `source`, which matters where the host has several.
pub(crate) fn send_from(
    socket: RawFd,
    bytes: &[u8],
    to: &SockAddr,
    source: Option<IpAddr>,
) -> io::Result<()> {
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let mut control = Control([0; 128]);
    // SAFETY: an all-zero msghdr is valid.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = to.as_ptr().cast_mut().cast();
    header.msg_namelen = to.len();
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    match source {
        Some(IpAddr::V4(address)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from_ne_bytes(address.octets()),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            attach(
                &mut header,
                &mut control,
                libc::IPPROTO_IP,
                libc::IP_PKTINFO,
                info,
            );
        }
        Some(IpAddr::V6(address)) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: address.octets(),
                },
                ipi6_ifindex: 0,
            };
            attach(
                &mut header,
                &mut control,
                libc::IPPROTO_IPV6,
                libc::IPV6_PKTINFO,
                info,
            );
        }
        None => {}
    }
    // SAFETY: name, vector and control message live until the call returns and have the lengths stated.
    let sent = unsafe {
        libc::sendmsg(
            socket,
            &raw const header,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn attach<T: Copy>(
    header: &mut libc::msghdr,
    control: &mut Control,
    level: i32,
    kind: i32,
    data: T,
) {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let total = HEADER + size_of::<T>();
    assert!(
        total <= size_of::<Control>(),
        "both kinds of pktinfo are 20 bytes at most"
    );
    let head = libc::cmsghdr {
        cmsg_len: total,
        cmsg_level: level,
        cmsg_type: kind,
    };
    // SAFETY: checked above that both fit; the writes need no alignment.
    unsafe {
        control
            .0
            .as_mut_ptr()
            .cast::<libc::cmsghdr>()
            .write_unaligned(head);
        control
            .0
            .as_mut_ptr()
            .add(HEADER)
            .cast::<T>()
            .write_unaligned(data);
    }
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = total.next_multiple_of(align_of::<usize>());
}

/// Whether a packet was refused because there is no way for it at the moment: an outage, as the peer will see it.
/// Anything else is a shortage of the sender's own.
pub(crate) fn is_outage(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        // The answer to a packet that a local firewall drops.
        io::ErrorKind::PermissionDenied
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkDown
    )
}

/// A random number from the kernel, which needs no `/dev`.
pub(crate) fn random() -> io::Result<u64> {
    let mut bytes = [0_u8; 8];
    // SAFETY: the buffer has the length stated.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // The kernel never gives less than asked for up to 256 bytes, see getrandom(2).
    if filled < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(u64::from_ne_bytes(bytes))
    }
}

/// Lets timers of the calling thread fire when they are due; those of ordinary threads may be 50 µs late to be coalesced.
pub(crate) fn prompt_timers() {
    // SAFETY: takes plain integers. 1 ns, since 0 would mean the default.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64) };
}

/// Real-time priority of threads whose time is taken packet by packet: they send, or take in what came.
pub(crate) const PACKETS: i32 = 10;
/// That of threads with streams and connections: little to do, and not to wait until a burst of packets is taken in.
pub(crate) const STREAMS: i32 = 11;

/// Gives the calling thread real-time priority, if the system lets it.
pub(crate) fn prefer_this_thread(priority: i32) -> bool {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: 0 is the calling thread; `parameters` outlives the call.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) == 0 }
}

fn set_flag(socket: BorrowedFd<'_>, option: i32) -> io::Result<()> {
    set_option(socket, option, 1)
}

fn set_option(socket: BorrowedFd<'_>, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: `value` is an int, as all options used here are.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            length(size_of::<i32>()),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sizes of a few hundred bytes, for the interfaces that count in 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "sizes of structures")]
fn length(size: usize) -> u32 {
    size as u32
}
