//! A station that speaks in raw frames, tags included.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use arp_proxy::Mac;
use arp_proxy::answer::Tag;
use socket2::{
    Domain, MaybeUninitSlice, MsgHdrMut, Protocol, SockAddr, SockAddrStorage, Socket, Type,
};

use crate::support::within;

const PATIENCE: Duration = Duration::from_secs(20);
const HEADER: usize = 14;

/// A socket of one interface, in a namespace.
pub(crate) struct Station(Socket);

/// A frame that came in, with its tags where they were on the wire.
#[derive(Debug)]
pub(crate) struct Received(Vec<u8>);

impl Station {
    pub(crate) fn open(namespace: &str, interface: &str) -> Self {
        within(namespace, || Self::of(interface).unwrap())
    }

    fn of(interface: &str) -> io::Result<Self> {
        let protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        let index = nix::net::if_::if_nametoindex(interface)?;
        let mut storage = SockAddrStorage::zeroed();
        // SAFETY: sockaddr_ll is one of the platform's sockaddr types, and fits.
        let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::try_from(index).unwrap();
        let length = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
        // SAFETY: the storage holds a sockaddr_ll of that length.
        socket.bind(&unsafe { SockAddr::new(storage, length) })?;
        // SAFETY: the option is an int.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_AUXDATA,
                (&raw const ONE).cast(),
                4,
            )
        };
        assert_eq!(set, 0);
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(Self(socket))
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        self.0.send(frame).unwrap();
    }

    /// Waits for a frame of interest.
    pub(crate) fn receive(&self, wanted: impl Fn(&Received) -> bool) -> Received {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "nothing within {PATIENCE:?}");
            if let Some(received) = self.try_receive().filter(&wanted) {
                return received;
            }
        }
    }

    fn try_receive(&self) -> Option<Received> {
        let mut frame = [MaybeUninit::new(0); 2048];
        let mut control = [MaybeUninit::new(0); 128];
        let mut vector = [MaybeUninitSlice::new(&mut frame)];
        let mut header = MsgHdrMut::new()
            .with_buffers(&mut vector)
            .with_control(&mut control);
        let length = self.0.recvmsg(&mut header, 0).ok()?;
        let told = header.control_len();
        // SAFETY: both were filled with zeros before the kernel wrote into them.
        let (frame, control) = unsafe { (frame.assume_init_ref(), control.assume_init_ref()) };
        let mut frame = frame[..length].to_vec();
        // The only control message: its header, then tpacket_auxdata, whose status is first and whose tag is last.
        let data = control[..told].get(size_of::<libc::cmsghdr>()..)?;
        let half = |at: usize| u16::from_ne_bytes([data[at], data[at + 1]]);
        let status = u32::from_ne_bytes(*data.first_chunk()?);
        if status & libc::TP_STATUS_VLAN_VALID != 0 {
            let tag = [half(18).to_be_bytes(), half(16).to_be_bytes()].concat();
            frame.splice(12..12, tag);
        }
        Some(Received(frame))
    }
}

static ONE: i32 = 1;

impl Received {
    pub(crate) fn is_to(&self, mac: Mac) -> bool {
        self.0[..6] == mac.octets()
    }

    pub(crate) fn tags(&self) -> Vec<Tag> {
        let half = |at: usize| u16::from_be_bytes([self.0[at], self.0[at + 1]]);
        let starts = (12..).step_by(4);
        starts
            .map(|at| Tag {
                tpid: half(at),
                tci: half(at + 2),
            })
            .take_while(|tag| matches!(tag.tpid, 0x8100 | 0x88a8))
            .collect()
    }

    /// Behind the Ethernet header and the tags.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.0[HEADER + 4 * self.tags().len()..]
    }
}

/// Who has 169.254.1.1?
pub(crate) fn arp_request(asker: Mac, address: [u8; 4], tags: &[Tag]) -> Vec<u8> {
    let mut frame = [[0xff; 6], asker.octets()].concat();
    for tag in tags {
        frame.extend(tag.tpid.to_be_bytes());
        frame.extend(tag.tci.to_be_bytes());
    }
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(asker.octets());
    frame.extend(address);
    frame.extend([0; 6]);
    frame.extend([169, 254, 1, 1]);
    frame
}
