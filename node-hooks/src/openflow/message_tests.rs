use proptest::prelude::*;
use rstest::rstest;

use super::*;
use crate::openflow::Refusal;

const RESUBMIT: &[u8] = b"\xff\xff\x00\x10\x00\x00\x23\x20\x00\x0e\xff\xf8\x00\x00\x00\x00";

fn packet_out(version: Version) -> BytesMut {
    let mut out = BytesMut::new();
    put_packet_out(&mut out, version, 0x0102_0304, 0xfeff, b"frame");
    out
}

fn decode(bytes: &[u8]) -> Result<Option<Message>, FrameError> {
    Codec.decode(&mut BytesMut::from(bytes))
}

fn hello(version: u8, elements: &[u8]) -> Message {
    Message {
        version,
        kind: kind::HELLO,
        xid: 0,
        body: Bytes::copy_from_slice(elements),
    }
}

/// OpenFlow 1.0, section 5.3.6.
#[test]
fn a_packet_out_of_1_0() {
    let expected = [
        b"\x01\x0d\x00\x25\x01\x02\x03\x04\xff\xff\xff\xff\xfe\xff\x00\x10".as_slice(),
        RESUBMIT,
        b"frame",
    ];
    assert_eq!(packet_out(Version::V10), expected.concat()[..]);
}

/// OpenFlow 1.3, section 7.3.7; 1.1, 1.2 and 1.4 have the same.
#[rstest]
#[case(Version::V11, 2)]
#[case(Version::V12, 3)]
#[case(Version::V13, 4)]
#[case(Version::V14, 5)]
fn a_packet_out_of_the_versions_between(#[case] version: Version, #[case] number: u8) {
    let expected = [
        &[number],
        b"\x0d\x00\x2d\x01\x02\x03\x04\xff\xff\xff\xff\x00\x00\xfe\xff".as_slice(),
        b"\x00\x10\x00\x00\x00\x00\x00\x00",
        RESUBMIT,
        b"frame",
    ];
    assert_eq!(packet_out(version), expected.concat()[..]);
}

/// OpenFlow 1.5, section 7.3.6: the port is a match.
#[test]
fn a_packet_out_of_1_5() {
    let expected = [
        b"\x06\x0d\x00\x35\x01\x02\x03\x04\xff\xff\xff\xff\x00\x10\x00\x00".as_slice(),
        b"\x00\x01\x00\x0c\x80\x00\x00\x04\x00\x00\xfe\xff\x00\x00\x00\x00",
        RESUBMIT,
        b"frame",
    ];
    assert_eq!(packet_out(Version::V15), expected.concat()[..]);
}

#[test]
fn a_hello_offers_all_versions() {
    let mut out = BytesMut::new();
    put_hello(&mut out);
    assert_eq!(
        out,
        b"\x06\x00\x00\x10\x00\x00\x00\x00\x00\x01\x00\x08\x00\x00\x00\x7e"[..]
    );
    let read = decode(&out).unwrap().unwrap();
    assert_eq!(read.offers(), Versions::OURS);
}

#[test]
fn what_a_hello_offers() {
    let bits = |version, elements: &[u8]| hello(version, elements).offers().bits();
    assert_eq!(bits(1, b""), 0b10);
    assert_eq!(bits(6, b"\x00\x01\x00\x08\x00\x00\x00\x12"), 0b1_0010);
    // Behind an element that is not known, padded to eight bytes.
    let behind = b"\x00\x07\x00\x05x\x00\x00\x00\x00\x01\x00\x08\x00\x00\x00\x02";
    assert_eq!(bits(6, behind), 0b10);
    // Two words: versions from 32 on in the second.
    let long = b"\x00\x01\x00\x0c\x00\x00\x00\x10\x00\x00\x00\x01\x00\x00\x00\x00";
    assert_eq!(bits(6, long), 0b1_0000);
    // An element that is cut short, is shorter than its header, has no word.
    for broken in [
        b"\x00\x01\x00\x08\x00\x00".as_slice(),
        b"\x00\x01\x00\x03\x00\x00\x00\x12",
        b"\x00\x01\x00\x04",
        b"\x00",
    ] {
        assert_eq!(bits(4, broken), 0b1_1110, "{broken:?}");
    }
}

#[test]
fn barriers_have_two_numbers() {
    let numbers = Version::ALL.map(|version| (barrier_request(version), barrier_reply(version)));
    assert_eq!(numbers[0], (18, 19));
    assert!(numbers[1..].iter().all(|numbers| *numbers == (20, 21)));
}

#[test]
fn a_message_is_taken_whole() {
    let bytes = b"\x04\x02\x00\x0b\x00\x00\x00\x07abc";
    for cut in 0..bytes.len() {
        assert_eq!(decode(&bytes[..cut]).unwrap(), None);
    }
    let message = decode(bytes).unwrap().unwrap();
    assert_eq!((message.version, message.kind, message.xid), (4, 2, 7));
    assert_eq!(message.body, b"abc"[..]);
}

#[test]
fn the_longest_message_is_taken_too() {
    let mut bytes = BytesMut::from(b"\x04\x13\xff\xff\x00\x00\x00\x07".as_slice());
    assert_eq!(Codec.decode(&mut bytes).unwrap(), None);
    bytes.resize(0x1_0000, 5);
    let message = Codec.decode(&mut bytes).unwrap().unwrap();
    assert_eq!(message.body, vec![5; 0xffff - 8]);
    // And nothing of the next.
    assert_eq!(bytes, [5][..]);
}

#[rstest]
#[case(0)]
#[case(7)]
fn a_length_that_cannot_be_is_an_error(#[case] length: u16) {
    let [high, low] = length.to_be_bytes();
    // As soon as the header is there, with nothing behind it.
    let error = decode(&[4, 2, high, low, 0, 0, 0, 0]).unwrap_err();
    assert!(matches!(error, FrameError::Length(told) if told == length));
    assert!(error.to_string().contains(&length.to_string()));
}

/// All messages of a stream that comes in pieces, and whether it ended with an error.
fn cut_into(pieces: &[&[u8]]) -> (Vec<Message>, bool) {
    let mut buffer = BytesMut::new();
    let mut messages = Vec::new();
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match Codec.decode(&mut buffer) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(_) => return (messages, true),
            }
        }
    }
    (messages, false)
}

prop_compose! {
    /// Whole messages, most of them, and whatever comes.
    fn stream()(
        parts in prop::collection::vec((any::<[u8; 2]>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..64)), 0..8),
        garbage in prop::collection::vec(any::<u8>(), 0..32),
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        for ([version, kind], xid, body) in parts {
            let length = u16::try_from(8 + body.len()).unwrap();
            bytes.extend([version, kind]);
            bytes.extend(length.to_be_bytes());
            bytes.extend(xid.to_be_bytes());
            bytes.extend(body);
        }
        bytes.extend(garbage);
        bytes
    }
}

proptest! {
    #[test]
    fn how_a_stream_is_cut_makes_no_difference(bytes in stream(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        places.sort_unstable();
        let mut pieces = Vec::new();
        let mut from = 0;
        for place in places {
            pieces.push(&bytes[from..place]);
            from = place;
        }
        pieces.push(&bytes[from..]);
        prop_assert_eq!(cut_into(&pieces), cut_into(&[&bytes]));
    }

    #[test]
    fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..256), version in any::<u8>()) {
        let (messages, _) = cut_into(&[&bytes]);
        let whole = Message { version, kind: kind::ERROR, xid: 1, body: Bytes::from(bytes) };
        for message in messages.iter().chain([&whole]) {
            let _ = message.offers().to_string();
            let _ = Refusal::read(message).to_string();
        }
    }

    #[test]
    fn what_is_written_can_be_read(port in 1..=0xfeff_u16, xid in any::<u32>(), frame in prop::collection::vec(any::<u8>(), 0..200)) {
        for version in Version::ALL {
            let mut out = BytesMut::new();
            put_packet_out(&mut out, version, xid, port, &frame);
            let message = decode(&out).unwrap().unwrap();
            prop_assert_eq!((message.version, message.kind, message.xid), (version.number(), kind::PACKET_OUT, xid));
            prop_assert!(message.body.ends_with(&frame));
        }
    }
}
