use proptest::prelude::*;
use rstest::rstest;

use super::*;

const PORT: u16 = 7;
const COOKIE: u64 = 0xc0de_c0de;
/// `in_port=7`.
const IN_PORT: &[u8] = b"\x00\x01\x00\x0c\x80\x00\x00\x04\x00\x00\x00\x07\x00\x00\x00\x00";
/// `metadata=0x1,reg15=0x2`, with the register as Open vSwitch has it.
const OUT: &[u8] =
    b"\x00\x01\x00\x18\x80\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01\x1e\x04\x00\x00\x00\x02";
/// Instructions that apply the action `output:1`.
const OUTPUT: &[u8] = b"\x00\x04\x00\x18\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00\x01\xff\xff\x00\x00\x00\x00\x00\x00";
/// The first part of an answer with more to come, and the last.
const FIRST: &[u8] = b"\x00\x01\x00\x01\x00\x00\x00\x00";
const LAST: &[u8] = b"\x00\x01\x00\x00\x00\x00\x00\x00";

/// What shuts port 7 for what comes in, in the words of 1.3.
pub(in crate::openflow) const SHUT_IN: &[u8] = b"\x00\x40\x00\x00\x00\x00\x00\x09\x3b\x9a\xc9\xff\
    \x03\xe8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\
    \x00\x00\x00\x00\xc0\xde\xc0\xde\
    \x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x01\x2c\
    \x00\x01\x00\x0c\x80\x00\x00\x04\x00\x00\x00\x07\x00\x00\x00\x00";
/// What shuts it for what goes out, in table 65.
pub(in crate::openflow) const SHUT_OUT: &[u8] = b"\x00\x48\x41\x00\x00\x00\x00\x09\x3b\x9a\xc9\xff\
    \x03\xe8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\
    \x00\x00\x00\x00\xc0\xde\xc0\xde\
    \x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x01\x2c\
    \x00\x01\x00\x18\x80\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01\x1e\x04\x00\x00\x00\x02";

/// What an answer says of a flow.
#[derive(Clone, Copy)]
struct Said {
    table: u8,
    priority: u16,
    cookie: u64,
    matched: &'static [u8],
    instructions: &'static [u8],
}

/// What shuts the port for what comes in.
const IN: Said = Said {
    table: 0,
    priority: 1000,
    cookie: COOKIE,
    matched: IN_PORT,
    instructions: b"",
};

impl Said {
    /// In the words of a version, with something in all that does not matter.
    fn entry(self, version: Version) -> Vec<u8> {
        const OTHER: &[u8] = &[0xee; 24];
        // Statistics of one field, the count of packets.
        const STATISTICS: &[u8] = b"\xee\xee\x00\x10\x80\x02\x08\x08\0\0\0\0\0\0\0\x05";
        let (priority, cookie) = (self.priority.to_be_bytes(), self.cookie.to_be_bytes());
        let behind_length = if version >= Version::V15 {
            [
                &OTHER[..2],
                &[self.table],
                &OTHER[..1],
                &priority,
                &OTHER[..8],
                &cookie,
                self.matched,
                STATISTICS,
                self.instructions,
            ]
            .concat()
        } else {
            [
                &[self.table],
                &OTHER[..9],
                &priority,
                &OTHER[..10],
                &cookie,
                &OTHER[..16],
                self.matched,
                self.instructions,
            ]
            .concat()
        };
        let length = u16::try_from(2 + behind_length.len()).unwrap();
        [&length.to_be_bytes()[..], &behind_length].concat()
    }

    fn block(self) -> Block {
        Block {
            table: self.table,
            priority: self.priority,
            cookie: self.cookie,
            matched: Bytes::from_static(self.matched),
        }
    }
}

fn part(header: &[u8], entries: &[Vec<u8>]) -> Bytes {
    Bytes::from([header, &entries.concat()].concat())
}

fn answer(version: Version, flows: &[Said]) -> Vec<Bytes> {
    let entries: Vec<_> = flows.iter().map(|flow| flow.entry(version)).collect();
    vec![part(LAST, &entries)]
}

fn put(version: Version, put: impl FnOnce(&mut BytesMut, Version)) -> BytesMut {
    let mut out = BytesMut::new();
    put(&mut out, version);
    out
}

/// OpenFlow 1.3, section 7.3.5.2.
#[test]
fn flows_in_the_words_of_1_3() {
    let parts = [part(LAST, &[SHUT_IN.to_vec(), SHUT_OUT.to_vec()])];
    assert_eq!(cookie(Version::V13, &parts, PORT).unwrap(), Some(COOKIE));
    let out = Said {
        table: 65,
        matched: OUT,
        ..IN
    };
    let found = blocks(Version::V13, &parts).unwrap();
    assert_eq!(found, [IN.block(), out.block()]);
}

/// OpenFlow 1.4, section 7.3.5.2: there is an importance behind the flags.
#[test]
fn flows_in_the_words_of_1_4() {
    let mut entry = SHUT_IN.to_vec();
    entry[20..22].copy_from_slice(&[0x12, 0x34]);
    let parts = [part(LAST, &[entry])];
    assert_eq!(cookie(Version::V14, &parts, PORT).unwrap(), Some(COOKIE));
    assert_eq!(blocks(Version::V14, &parts).unwrap(), [IN.block()]);
}

/// OpenFlow 1.5, section 7.3.5.2: statistics are behind the match, here a duration and a count of packets.
#[test]
fn flows_in_the_words_of_1_5() {
    let entry = b"\x00\x48\x00\x00\x00\x00\x03\xe8\x00\x00\x00\x00\x00\x00\x12\x34\
        \x00\x00\x00\x00\xc0\xde\xc0\xde\
        \x00\x01\x00\x0c\x80\x00\x00\x04\x00\x00\x00\x07\x00\x00\x00\x00\
        \x00\x00\x00\x1c\x80\x02\x00\x08\x00\x00\x00\x09\x3b\x9a\xc9\xff\
        \x80\x02\x08\x08\x00\x00\x00\x00\x00\x00\x00\x05\x00\x00\x00\x00";
    let parts = [part(LAST, &[entry.to_vec()])];
    assert_eq!(cookie(Version::V15, &parts, PORT).unwrap(), Some(COOKIE));
    assert_eq!(blocks(Version::V15, &parts).unwrap(), [IN.block()]);
}

/// Versions that describe flows so that it is understood.
const SPOKEN: [Version; 3] = [Version::V13, Version::V14, Version::V15];

#[test]
fn flows_are_asked_for_where_their_description_is_understood() {
    let spoken = Version::ALL.into_iter().filter(|version| speaks(*version));
    assert!(spoken.eq(SPOKEN));
}

#[rstest]
#[case::before_it(Said { priority: 1010, ..IN })]
#[case::behind_it(Said { priority: 999, ..IN })]
#[case::that_does_something(Said { instructions: OUTPUT, ..IN })]
#[case::of_another_port(Said {
    matched: b"\x00\x01\x00\x0c\x80\x00\x00\x04\x00\x00\x00\x08\x00\x00\x00\x00",
    ..IN
})]
#[case::of_a_port_with_the_same_low_bits(Said {
    matched: b"\x00\x01\x00\x0c\x80\x00\x00\x04\x00\x01\x00\x07\x00\x00\x00\x00",
    ..IN
})]
#[case::of_some_frames_of_the_port(Said {
    matched: b"\x00\x01\x00\x12\x80\x00\x00\x04\x00\x00\x00\x07\x80\x00\x0a\x02\x08\x06\0\0\0\0\0\0",
    ..IN
})]
#[case::of_all_frames(Said { matched: b"\x00\x01\x00\x04\0\0\0\0", ..IN })]
#[case::of_nobody(Said { cookie: 0, ..IN })]
fn a_flow_that_does_not_shut_the_port_tells_of_no_binding(#[case] flow: Said) {
    for version in SPOKEN {
        let alone = answer(version, &[flow]);
        assert_eq!(cookie(version, &alone, PORT).unwrap(), None, "{version}");
        // Nor does it hide the one that does.
        if flow.cookie != 0 {
            let other = Said {
                cookie: 0xbad,
                ..flow
            };
            let both = answer(version, &[other, IN]);
            assert_eq!(cookie(version, &both, PORT).unwrap(), Some(COOKIE));
        }
    }
}

#[test]
fn of_a_bindings_flows_those_shut_the_port_that_do_nothing_before_all_else() {
    let out = Said {
        table: 65,
        matched: OUT,
        ..IN
    };
    let before = Said {
        priority: 1010,
        instructions: OUTPUT,
        ..IN
    };
    let loopback = Said {
        priority: 100,
        table: 44,
        matched: OUT,
        ..IN
    };
    let output = Said {
        instructions: OUTPUT,
        ..out
    };
    for version in SPOKEN {
        let flows = [before, IN, loopback, output, out];
        let found = blocks(version, &answer(version, &flows)).unwrap();
        assert_eq!(found, [IN.block(), out.block()], "{version}");
    }
}

#[test]
fn an_answer_is_all_of_its_parts() {
    for version in SPOKEN {
        let out = Said {
            table: 65,
            matched: OUT,
            ..IN
        };
        let parts = [
            part(FIRST, &[]),
            part(FIRST, &[out.entry(version)]),
            part(LAST, &[IN.entry(version)]),
        ];
        assert!(parts.iter().map(has_more).eq([true, true, false]));
        assert_eq!(cookie(version, &parts, PORT).unwrap(), Some(COOKIE));
        let found = blocks(version, &parts).unwrap();
        assert_eq!(found, [out.block(), IN.block()]);
        // No flows are an answer, too.
        assert_eq!(cookie(version, &parts[..1], PORT).unwrap(), None);
        assert_eq!(blocks(version, &[part(LAST, &[])]).unwrap(), []);
    }
}

#[test]
fn other_flags_do_not_mean_that_there_is_more() {
    assert!(has_more(&Bytes::from_static(b"\0\x01\xff\xff\0\0\0\0")));
    assert!(!has_more(&Bytes::from_static(b"\0\x01\xff\xfe\0\0\0\0")));
    assert!(!has_more(&Bytes::from_static(b"\0\x01\xff")));
    assert!(!has_more(&Bytes::new()));
}

/// What is wrong with a part, which all that is made of it has to say.
fn complaint(version: Version, part: Bytes) -> String {
    let parts = [part];
    let error = blocks(version, &parts).unwrap_err();
    assert!(matches!(error, Error::Protocol(_)), "{error:?}");
    let text = error.to_string();
    let other = cookie(version, &parts, PORT).unwrap_err();
    assert_eq!(other.to_string(), text);
    text
}

#[test]
fn what_is_cut_short_is_an_error_wherever_that_is() {
    for version in SPOKEN {
        let whole = part(LAST, &[IN.entry(version), IN.entry(version)]);
        let one = LAST.len() + IN.entry(version).len();
        for cut in 0..whole.len() {
            if cut == LAST.len() || cut == one {
                assert!(blocks(version, &[whole.slice(..cut)]).is_ok());
            } else {
                complaint(version, whole.slice(..cut));
            }
        }
    }
}

/// A description with another length in it, as far behind its beginning.
fn with_length(version: Version, place: usize, length: u16) -> Bytes {
    let mut entry = IN.entry(version);
    entry[place..place + 2].copy_from_slice(&length.to_be_bytes());
    part(LAST, &[entry])
}

#[test]
fn lengths_that_cannot_be_are_errors() {
    for version in SPOKEN {
        let whole = u16::try_from(IN.entry(version).len()).unwrap();
        for length in [0, 1, 2, 23, whole - 1, whole + 1, u16::MAX] {
            let text = complaint(version, with_length(version, 0, length));
            assert!(text.contains("wrong in its"), "{length}: {text}");
        }
        // Behind all that there is, less than its own header, and only without the padding within what there is.
        let matched = if version >= Version::V15 { 24 } else { 48 };
        for length in [0, 3, 100, 0xfff8, 0xffff] {
            let text = complaint(version, with_length(version, matched + 2, length));
            assert!(text.contains("wrong in its match"), "{length}: {text}");
        }
    }
    for length in [0, 3, 17, 0xfff9, 0xffff] {
        let text = complaint(Version::V15, with_length(Version::V15, 24 + 16 + 2, length));
        assert!(text.contains("wrong in its statistics"), "{length}: {text}");
    }
    // A match whose padding is missing.
    let mut entry = IN.entry(Version::V13);
    entry.truncate(48 + 12);
    entry[1] = 48 + 12;
    let text = complaint(Version::V13, part(LAST, &[entry]));
    assert!(text.contains("wrong in its match"), "{text}");
}

/// OpenFlow 1.3, sections 7.3.5 and 7.3.5.2; 1.4 and 1.5 have the same.
#[rstest]
#[case(Version::V13, 4)]
#[case(Version::V14, 5)]
#[case(Version::V15, 6)]
fn what_is_asked(#[case] version: Version, #[case] number: u8) {
    let xid = 0x0102_0304;
    let first = put(version, |out, version| {
        put_request(out, version, xid, Wanted::In(PORT));
    });
    let expected = [
        &[number],
        b"\x12\x00\x40\x01\x02\x03\x04\x00\x01\x00\x00\x00\x00\x00\x00".as_slice(),
        b"\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
        b"\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
        IN_PORT,
    ];
    assert_eq!(first, expected.concat()[..]);
    let second = put(version, |out, version| {
        put_request(out, version, xid, Wanted::With(COOKIE));
    });
    let expected = [
        &[number],
        b"\x12\x00\x38\x01\x02\x03\x04\x00\x01\x00\x00\x00\x00\x00\x00".as_slice(),
        b"\xff\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
        b"\x00\x00\x00\x00\xc0\xde\xc0\xde\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x00\x01\x00\x04\x00\x00\x00\x00",
    ];
    assert_eq!(second, expected.concat()[..]);
}

/// OpenFlow 1.3, section 7.3.4; 1.4 and 1.5 have an importance in place of padding, which a removal has no use for.
#[rstest]
#[case(Version::V13, 4)]
#[case(Version::V14, 5)]
#[case(Version::V15, 6)]
fn a_removal_is_of_what_was_found_and_of_nothing_else(
    #[case] version: Version,
    #[case] number: u8,
) {
    let out = Said {
        table: 65,
        matched: OUT,
        ..IN
    };
    let found = blocks(version, &answer(version, &[out])).unwrap();
    let removal = put(version, |out, version| {
        put_removal(out, version, 0x0102_0304, &found[0]);
    });
    let expected = [
        &[number],
        b"\x0e\x00\x48\x01\x02\x03\x04".as_slice(),
        // The cookie and all of it; the table, OFPFC_DELETE_STRICT, no time-outs, the priority.
        b"\x00\x00\x00\x00\xc0\xde\xc0\xde\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x41\x04\x00\x00\x00\x00\x03\xe8",
        // No buffer, OFPP_ANY, OFPG_ANY, no flags.
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
        OUT,
    ];
    assert_eq!(removal, expected.concat()[..]);
}

prop_compose! {
    /// Descriptions, most of whose lengths are as they should be.
    fn spoilt()(
        version in prop::sample::select(SPOKEN.to_vec()),
        flows in 0..4_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        end in any::<prop::sample::Index>(),
    ) -> (Version, Vec<u8>) {
        let mut bytes = part(LAST, &vec![IN.entry(version); flows]).to_vec();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        bytes.truncate(1 + end.index(bytes.len()));
        (version, bytes)
    }
}

/// What can be made of bytes, without a panic; and what is made of it again.
fn is_survived(version: Version, bytes: Vec<u8>) {
    let parts = [Bytes::from(bytes)];
    has_more(&parts[0]);
    let _ = cookie(version, &parts, PORT);
    for block in blocks(version, &parts).into_iter().flatten() {
        let removal = put(version, |out, version| put_removal(out, version, 1, &block));
        assert_eq!(
            usize::from(u16::from_be_bytes([removal[2], removal[3]])),
            removal.len()
        );
    }
}

proptest! {
    #[test]
    fn no_bytes_cause_a_panic(
        version in prop::sample::select(SPOKEN.to_vec()),
        bytes in prop::collection::vec(any::<u8>(), 0..256),
    ) {
        is_survived(version, bytes);
    }

    #[test]
    fn no_spoilt_description_causes_a_panic((version, bytes) in spoilt()) {
        is_survived(version, bytes);
    }
}
