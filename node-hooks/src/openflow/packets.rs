//! Frames for a switch to take in, and the one that opens a port.

use arp_proxy::Mac;
use bytes::{Bytes, BytesMut};

use super::Error;
use super::message::{self, PACKET_OUT_OVERHEAD};
use super::version::Version;

/// The last port below `OFPP_MAX` (0xff00): behind it are numbers that mean no port. Open vSwitch numbers the ports of a
/// bridge in 16 bits whatever the version (ovs-fields(7), `in_port`).
pub(super) const LAST_PORT: u16 = 0xfeff;
/// What leaves room for the rest of a packet-out, whose length has 16 bits.
pub(super) const LONGEST_FRAME: usize = u16::MAX as usize - PACKET_OUT_OVERHEAD;

const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
/// Ethernet and IPv4, with addresses of 6 and of 4 bytes, operation 3: request reverse (RFC 903).
const REQUEST_REVERSE: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];

/// Frames that a switch is to take as if they had come in by its ports, in this order.
///
/// A frame goes through all of the switch's tables (`resubmit(,0)`), like one that the port's machine has sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PacketOuts(Vec<PacketOut>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct PacketOut {
    in_port: u16,
    frame: Bytes,
}

impl PacketOuts {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// What opens ports that wait for their machine to announce itself, by OpenFlow number and Ethernet address.
    ///
    /// # Errors
    /// [`Error::Port`].
    pub fn opening(ports: impl IntoIterator<Item = (u16, Mac)>) -> Result<Self, Error> {
        let mut all = Self::new();
        for (port, mac) in ports {
            all.push(port.into(), Bytes::copy_from_slice(&rarp(mac)))?;
        }
        Ok(all)
    }

    /// Adds a frame, from its Ethernet header on.
    ///
    /// # Errors
    /// [`Error::Port`] for a number that no port has, [`Error::Frame`] for a frame that is too long.
    pub fn push(&mut self, in_port: u32, frame: impl Into<Bytes>) -> Result<(), Error> {
        let in_port = u16::try_from(in_port)
            .ok()
            .filter(|port| (1..=LAST_PORT).contains(port))
            .ok_or(Error::Port(in_port))?;
        let frame = frame.into();
        if frame.len() > LONGEST_FRAME {
            return Err(Error::Frame(frame.len()));
        }
        self.0.push(PacketOut { in_port, frame });
        Ok(())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their ports, in order.
    pub(super) fn ports(&self) -> Vec<u16> {
        self.0.iter().map(|packet| packet.in_port).collect()
    }

    /// Appends them as messages, with transactions from `xid` on.
    pub(super) fn put(&self, out: &mut BytesMut, version: Version, mut xid: u32) {
        out.reserve(
            self.0
                .iter()
                .map(|packet| packet.frame.len() + PACKET_OUT_OVERHEAD)
                .sum(),
        );
        for packet in &self.0 {
            message::put_packet_out(out, version, xid, packet.in_port, &packet.frame);
            xid = xid.wrapping_add(1);
        }
    }
}

/// The frame by which QEMU announces a machine that has come: a broadcast RARP request from its Ethernet address, about
/// its Ethernet address, padded to Ethernet's minimum. OVN's `activation-strategy=rarp` opens a port for it.
pub fn rarp(mac: Mac) -> [u8; 60] {
    let mut frame = [0; 60];
    let mac = mac.octets();
    let parts = [
        (0, [0xff; 6].as_slice()),
        (6, &mac),
        (12, &ETHERTYPE_RARP),
        (14, &REQUEST_REVERSE),
        // Sender's and target's; the IPv4 address behind each is what a RARP request asks for.
        (22, &mac),
        (32, &mac),
    ];
    for (at, bytes) in parts {
        let place = frame.iter_mut().skip(at).zip(bytes);
        place.for_each(|(place, byte)| *place = *byte);
    }
    frame
}

#[cfg(test)]
mod tests {
    use etherparse::{ArpOperation, ArpPacketSlice, EtherType, Ethernet2Slice};

    use super::*;

    const MAC: Mac = pnet_base::MacAddr(0x52, 0x54, 0, 1, 2, 3);

    #[test]
    fn a_rarp_is_what_qemu_would_send() {
        let frame = rarp(MAC);
        let ethernet = Ethernet2Slice::from_slice_without_fcs(&frame).unwrap();
        assert_eq!(ethernet.destination(), [0xff; 6]);
        assert_eq!(ethernet.source(), MAC.octets());
        assert_eq!(ethernet.ether_type(), EtherType(0x8035));
        let rarp = ArpPacketSlice::from_slice(ethernet.payload_slice()).unwrap();
        assert_eq!(rarp.operation(), ArpOperation(3));
        assert_eq!(rarp.hw_addr_type().0, 1);
        assert_eq!(rarp.proto_addr_type(), EtherType::IPV4);
        assert_eq!(rarp.sender_hw_addr(), MAC.octets());
        assert_eq!(rarp.target_hw_addr(), MAC.octets());
        assert_eq!(rarp.sender_protocol_addr(), [0; 4]);
        assert_eq!(rarp.target_protocol_addr(), [0; 4]);
    }

    #[test]
    fn numbers_that_no_port_has_are_refused() {
        for port in [0, 0xff00, 0xfffe, 0xffff, 0x1_0001, 0xffff_fff8, u32::MAX] {
            let error = PacketOuts::new()
                .push(port, rarp(MAC).to_vec())
                .unwrap_err();
            assert!(matches!(error, Error::Port(number) if number == port));
            assert!(error.to_string().starts_with(&port.to_string()), "{error}");
        }
        assert_eq!(
            PacketOuts::opening([(1, MAC), (0xfeff, MAC)])
                .unwrap()
                .len(),
            2
        );
    }

    #[test]
    fn a_frame_that_fits_in_no_message_is_refused() {
        let mut packets = PacketOuts::new();
        packets.push(1, vec![0; LONGEST_FRAME]).unwrap();
        let error = packets.push(1, vec![0; LONGEST_FRAME + 1]).unwrap_err();
        assert!(matches!(error, Error::Frame(65_488)), "{error:?}");
        assert_eq!(packets.len(), 1);
        for version in Version::ALL {
            let mut out = BytesMut::new();
            packets.put(&mut out, version, 1);
            let length = u16::from_be_bytes([out[2], out[3]]);
            assert_eq!(usize::from(length), out.len());
        }
    }
}
