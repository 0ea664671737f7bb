//! The Linux calls that socket2 does not have. All of the crate's `unsafe` for sockets is here and in its one caller.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use socket2::{SockAddr, SockAddrStorage, Socket};

use crate::Mac;
use crate::answer::Tag;

/// What is told beside a frame.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) tag: Option<Tag>,
    pub(super) dropped: u32,
    /// Nanoseconds of Unix time.
    pub(super) stamp: Option<u64>,
}

/// What the kernel has counted since it was asked last.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// Frames that passed the filter, those included that were dropped then.
    pub passed: u32,
    /// Frames that passed the filter and found no room.
    pub dropped: u32,
}

/// Asks for what a [`Told`] has, and not to be given what this host sends.
pub(super) fn report(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1_i32)?;
    set_option(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &1_i32)?;
    // Saves a copy of every frame sent by anybody. Kernels before 4.20 do not know it; the filter drops those frames.
    let _ = set_option(
        socket,
        libc::SOL_PACKET,
        libc::PACKET_IGNORE_OUTGOING,
        &1_i32,
    );
    Ok(())
}

/// Asks for the time at which a frame passed the interface.
pub(super) fn stamp(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1_i32)
}

/// Reads, and thereby resets, what the kernel counts (`packet(7)`, PACKET_STATISTICS).
pub(super) fn statistics(socket: BorrowedFd<'_>) -> io::Result<Statistics> {
    let mut counted = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut length = u32::try_from(size_of::<libc::tpacket_stats>()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes a tpacket_stats, which is what `counted` is, and `length` says how long it is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut counted).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Statistics {
        passed: counted.tp_packets,
        dropped: counted.tp_drops,
    })
}

/// Asks for a receive buffer beyond `net.core.rmem_max`, which takes `CAP_NET_ADMIN`, or else for as much as there is.
pub(super) fn set_receive_buffer(socket: &Socket, bytes: i32) -> io::Result<()> {
    let socket = socket.as_fd();
    set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &bytes)
        .or_else(|_| set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &bytes))
}

/// Has the interface let the group in for as long as the socket is open.
pub(super) fn join(socket: BorrowedFd<'_>, interface: i32, group: Mac) -> io::Result<()> {
    let mut address = [0; 8];
    address
        .iter_mut()
        .zip(group.octets())
        .for_each(|(place, byte)| *place = byte);
    let request = libc::packet_mreq {
        mr_ifindex: interface,
        mr_type: narrow(libc::PACKET_MR_MULTICAST)?,
        mr_alen: 6,
        mr_address: address,
    };
    set_option(
        socket,
        libc::SOL_PACKET,
        libc::PACKET_ADD_MEMBERSHIP,
        &request,
    )
}

/// Binds to an interface, for frames of an EtherType.
pub(super) fn bind(socket: &Socket, interface: i32, protocol: i32) -> io::Result<()> {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is one of the platform's sockaddr types, and fits.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = narrow(libc::AF_PACKET)?;
    address.sll_protocol = narrow(protocol)?.to_be();
    address.sll_ifindex = interface;
    let length = u32::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)?;
    // SAFETY: the storage holds a sockaddr_ll of that length.
    socket.bind(&unsafe { SockAddr::new(storage, length) })
}

/// The index of the interface that has this name now.
pub fn index_of(interface: &str) -> io::Result<u32> {
    let name = CString::new(interface).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: `name` is a C string that outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Reads what is told beside a frame.
///
/// As bytes rather than with `CMSG_NXTHDR`, so that no length, however odd, leads out of the buffer.
pub(super) fn control_messages(mut rest: &[u8]) -> Told {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let mut told = Told::default();
    while rest.len() >= HEADER {
        // SAFETY: at least a cmsghdr's bytes are there, and any bytes are a valid one; read_unaligned needs no more.
        let head = unsafe { rest.as_ptr().cast::<libc::cmsghdr>().read_unaligned() };
        let Some(data) = rest.get(HEADER..head.cmsg_len) else {
            break;
        };
        match (head.cmsg_level, head.cmsg_type) {
            (libc::SOL_PACKET, libc::PACKET_AUXDATA) => told.tag = tag(data),
            (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => {
                told.dropped = data
                    .first_chunk()
                    .map_or(0, |&count| u32::from_ne_bytes(count));
            }
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => told.stamp = time(data),
            _ => {}
        }
        rest = rest
            .get(head.cmsg_len.next_multiple_of(align_of::<usize>())..)
            .unwrap_or_default();
    }
    told
}

/// The tag in a `struct tpacket_auxdata`.
fn tag(data: &[u8]) -> Option<Tag> {
    if data.len() < size_of::<libc::tpacket_auxdata>() {
        return None;
    }
    // SAFETY: its bytes are there, and any bytes are a valid one, integers all; read_unaligned needs no more.
    let aux = unsafe {
        data.as_ptr()
            .cast::<libc::tpacket_auxdata>()
            .read_unaligned()
    };
    (aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(Tag {
        tpid: if aux.tp_status & libc::TP_STATUS_VLAN_TPID_VALID == 0 {
            0x8100
        } else {
            aux.tp_vlan_tpid
        },
        tci: aux.tp_vlan_tci,
    })
}

/// Nanoseconds of a `struct timespec`; none if it is before 1970 or no time.
fn time(data: &[u8]) -> Option<u64> {
    if data.len() < size_of::<libc::timespec>() {
        return None;
    }
    // SAFETY: its bytes are there, and any bytes are a valid one, integers all; read_unaligned needs no more.
    let time = unsafe { data.as_ptr().cast::<libc::timespec>().read_unaligned() };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    let rest = u64::try_from(time.tv_nsec).ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(rest)
}

fn set_option<T>(socket: BorrowedFd<'_>, level: i32, option: i32, value: &T) -> io::Result<()> {
    let length = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: `value` is as long as stated; the kernel takes each option used here as the type it is given as.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn narrow(constant: i32) -> io::Result<u16> {
    u16::try_from(constant).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(level: i32, kind: i32, data: &[u8]) -> Vec<u8> {
        let length = size_of::<libc::cmsghdr>() + data.len();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(data);
        bytes.resize(length.next_multiple_of(align_of::<usize>()), 0);
        bytes
    }

    fn auxiliary(status: u32, tci: u16, tpid: u16) -> Vec<u8> {
        let mut data = [status, 60, 60].map(u32::to_ne_bytes).concat();
        data.extend([14, 14, tci, tpid].map(u16::to_ne_bytes).concat());
        message(libc::SOL_PACKET, libc::PACKET_AUXDATA, &data)
    }

    #[test]
    fn the_tag_that_the_kernel_took_off() {
        let valid = libc::TP_STATUS_VLAN_VALID;
        let both = valid | libc::TP_STATUS_VLAN_TPID_VALID;
        let read = |status, tpid| control_messages(&auxiliary(status, 0x2064, tpid)).tag;
        let tag = |tpid| Some(Tag { tpid, tci: 0x2064 });
        assert_eq!(read(both, 0x88a8), tag(0x88a8));
        assert_eq!(read(valid, 0), tag(0x8100));
        assert_eq!(read(0, 0), None);
    }

    #[test]
    fn several_messages_in_a_row() {
        let dropped = message(libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &7_u32.to_ne_bytes());
        let unknown = message(libc::SOL_SOCKET, 12_345, &[1, 2, 3]);
        let all = [
            dropped,
            unknown,
            auxiliary(libc::TP_STATUS_VLAN_VALID, 100, 0),
        ]
        .concat();
        let told = control_messages(&all);
        assert_eq!(told.dropped, 7);
        assert_eq!(told.tag.map(|tag| tag.tci), Some(100));
    }

    #[test]
    fn the_time_at_which_a_frame_passed() {
        let read = |seconds: i64, rest: i64| {
            let data = [seconds, rest].map(i64::to_ne_bytes).concat();
            control_messages(&message(libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS, &data)).stamp
        };
        assert_eq!(read(1_756_720_805, 7), Some(1_756_720_805_000_000_007));
        assert_eq!(read(-1, 0), None);
        assert_eq!(read(i64::MAX, 0), None);
        let short = message(libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS, &[0; 8]);
        assert_eq!(control_messages(&short).stamp, None);
    }

    proptest! {
        #[test]
        fn no_bytes_lead_out_of_the_buffer(bytes in prop::collection::vec(any::<u8>(), 0..128), length in any::<usize>()) {
            let _ = control_messages(&bytes);
            let mut lying = message(libc::SOL_PACKET, libc::PACKET_AUXDATA, &bytes);
            for (place, byte) in lying.iter_mut().zip(length.to_ne_bytes()) {
                *place = byte;
            }
            let _ = control_messages(&lying);
        }
    }
}
