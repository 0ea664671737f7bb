//! The classic capture file format: a header, then records.
//!
//! Of its versions there has only ever been 2.4. The magic number says in which byte order the
//! writer was and whether it stamped micro- or nanoseconds.

use thiserror::Error;

const HEADER: usize = 24;
const RECORD_HEADER: usize = 16;
/// As `tcpdump` and libpcap have it: a longer record is not one.
const LONGEST: u32 = 262_144;

/// Why a file is not a capture, or not one that can be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PcapError {
    /// Shorter than the header of a file.
    #[error("{0} bytes are no capture: its header alone has {HEADER}")]
    NoHeader(usize),
    /// Another format.
    #[error(
        "{0:#010x} is not how a pcap file begins; `tcpdump -r FILE -w NEW` converts other captures"
    )]
    Magic(u32),
    /// Frames of another kind of network.
    #[error(
        "frames of link type {0}; {ethernet} (Ethernet) and {sll2} (LINUX_SLL2, \
         `tcpdump -i any`) can be read",
        ethernet = Link::ETHERNET,
        sll2 = Link::SLL2
    )]
    Link(u32),
    /// The file ends within a record.
    #[error("record {record} at byte {offset} is cut off: {got} bytes where {needed} are needed")]
    Truncated {
        /// Its number, from 1.
        record: usize,
        /// Where it begins.
        offset: usize,
        /// How many bytes are left.
        got: usize,
        /// How many it has.
        needed: usize,
    },
    /// A record that no writer makes.
    #[error("record {record} at byte {offset} is no record: {why}")]
    Malformed {
        /// Its number, from 1.
        record: usize,
        /// Where it begins.
        offset: usize,
        /// What is wrong.
        why: &'static str,
    },
}

/// What frames of a file begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Ethernet's header.
    Ethernet,
    /// What Linux gives for frames of all interfaces: "cooked", version 2.
    Sll2,
}

/// A frame as it was captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its number in the file, from 1.
    pub number: usize,
    /// When it passed, in nanoseconds of Unix time.
    pub at_ns: u64,
    /// What there is of it.
    pub bytes: &'a [u8],
    /// There was more.
    pub cut: bool,
}

/// The records of a capture file, in the order they were captured.
#[derive(Clone, Debug)]
pub struct Pcap<'a> {
    link: Link,
    order: Order,
    /// Of a stamp's fraction.
    unit_ns: u32,
    file: &'a [u8],
    offset: usize,
    read: usize,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Big,
    Little,
}

impl Link {
    const ETHERNET: u32 = 1;
    const SLL2: u32 = 276;

    fn of(number: u32) -> Option<Self> {
        // The upper bits tell of check sequences behind the frames.
        match number & 0x0fff_ffff {
            Self::ETHERNET => Some(Self::Ethernet),
            Self::SLL2 => Some(Self::Sll2),
            _ => None,
        }
    }
}

impl Order {
    /// Reads four bytes at `offset`; zero where there are none, which callers have excluded.
    fn u32_at(self, bytes: &[u8], offset: usize) -> u32 {
        let four = bytes.get(offset..).and_then(<[u8]>::first_chunk);
        let four = four.copied().unwrap_or_default();
        match self {
            Self::Big => u32::from_be_bytes(four),
            Self::Little => u32::from_le_bytes(four),
        }
    }
}

impl<'a> Pcap<'a> {
    /// Reads the header of a file.
    pub fn new(file: &'a [u8]) -> Result<Self, PcapError> {
        const MICROSECONDS: u32 = 0xa1b2_c3d4;
        const NANOSECONDS: u32 = 0xa1b2_3c4d;
        if file.len() < HEADER {
            return Err(PcapError::NoHeader(file.len()));
        }
        let found =
            [Order::Little, Order::Big]
                .into_iter()
                .find_map(|order| match order.u32_at(file, 0) {
                    MICROSECONDS => Some((order, 1_000)),
                    NANOSECONDS => Some((order, 1)),
                    _ => None,
                });
        let (order, unit_ns) = found.ok_or(PcapError::Magic(Order::Big.u32_at(file, 0)))?;
        let link = order.u32_at(file, 20);
        Ok(Self {
            link: Link::of(link).ok_or(PcapError::Link(link))?,
            order,
            unit_ns,
            file,
            offset: HEADER,
            read: 0,
        })
    }

    /// What its frames begin with.
    pub fn link(&self) -> Link {
        self.link
    }

    fn record(&mut self) -> Result<Record<'a>, PcapError> {
        let (record, offset) = (self.read + 1, self.offset);
        let rest = self.file.get(offset..).unwrap_or_default();
        let truncated = |needed| PcapError::Truncated {
            record,
            offset,
            got: rest.len(),
            needed,
        };
        let malformed = |why| PcapError::Malformed {
            record,
            offset,
            why,
        };
        if rest.len() < RECORD_HEADER {
            return Err(truncated(RECORD_HEADER));
        }
        let field = |number: usize| self.order.u32_at(rest, number * 4);
        let (seconds, fraction, length, original) = (field(0), field(1), field(2), field(3));
        if length > LONGEST {
            return Err(malformed("it is longer than any frame"));
        }
        if length > original {
            return Err(malformed("there is more of the frame than it had"));
        }
        let nanos = u64::from(fraction) * u64::from(self.unit_ns);
        if nanos >= 1_000_000_000 {
            return Err(malformed("its stamp has a fraction of more than a second"));
        }
        let needed = RECORD_HEADER + length as usize;
        let bytes = rest.get(RECORD_HEADER..needed);
        let bytes = bytes.ok_or_else(|| truncated(needed))?;
        self.offset += needed;
        self.read = record;
        Ok(Record {
            number: record,
            at_ns: u64::from(seconds) * 1_000_000_000 + nanos,
            bytes,
            cut: length < original,
        })
    }
}

impl<'a> Iterator for Pcap<'a> {
    type Item = Result<Record<'a>, PcapError>;

    /// The next record. After an error there is none: where the next begins cannot be told.
    fn next(&mut self) -> Option<Self::Item> {
        if self.offset >= self.file.len() {
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.offset = self.file.len();
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with a magic number, a link type and records of stamp, length and true length, all
    /// little-endian.
    fn file(magic: u32, link: u32, records: &[(u32, u32, &[u8], u32)]) -> Vec<u8> {
        let words = [magic, 0x0004_0002, 0, 0, 262_144, link];
        let mut file: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        for &(seconds, fraction, bytes, original) in records {
            let length = u32::try_from(bytes.len()).unwrap();
            let words = [seconds, fraction, length, original];
            file.extend(words.into_iter().flat_map(u32::to_le_bytes));
            file.extend(bytes);
        }
        file
    }

    fn read(file: &[u8]) -> Result<Vec<Record<'_>>, PcapError> {
        Pcap::new(file)?.collect()
    }

    #[test]
    fn records_are_read_in_order_with_their_times() {
        let micro = file(
            0xa1b2_c3d4,
            1,
            &[(5, 7, b"one", 3), (6, 999_999, b"tw", 400)],
        );
        let records = read(&micro).unwrap();
        let [one, two] = records.as_slice() else {
            panic!("{records:?}");
        };
        let bytes: (&[u8], &[u8]) = (b"one", b"tw");
        assert_eq!((one.bytes, two.bytes), bytes);
        assert_eq!((one.number, two.number), (1, 2));
        assert_eq!((one.at_ns, two.at_ns), (5_000_007_000, 6_999_999_000));
        assert_eq!((one.cut, two.cut), (false, true));

        let nano = file(0xa1b2_3c4d, 276, &[(5, 7, b"one", 3)]);
        let pcap = Pcap::new(&nano).unwrap();
        assert_eq!(pcap.link(), Link::Sll2);
        assert_eq!(read(&nano).unwrap()[0].at_ns, 5_000_000_007);
        assert_eq!(read(&file(0xa1b2_3c4d, 276, &[])), Ok(Vec::new()));
    }

    #[test]
    fn the_other_byte_order_is_read_as_well() {
        let words = [0xa1b2_3c4d, 0x0002_0004, 0, 0, 192, 1, 5, 7, 2, 2];
        let mut file: Vec<u8> = words.into_iter().flat_map(u32::to_be_bytes).collect();
        file.extend(b"ab");
        let records = read(&file).unwrap();
        assert_eq!(records[0].at_ns, 5_000_000_007);
        assert_eq!(records[0].bytes, b"ab");
    }

    #[test]
    fn a_file_that_ends_early_says_where_at_every_length() {
        let whole = file(0xa1b2_3c4d, 1, &[(5, 7, b"one", 3), (6, 8, b"two", 3)]);
        let first_end = HEADER + RECORD_HEADER + 3;
        for length in 0..whole.len() {
            let read = read(&whole[..length]);
            match length {
                0..HEADER => assert_eq!(read, Err(PcapError::NoHeader(length))),
                HEADER => assert_eq!(read, Ok(Vec::new())),
                _ if length == first_end => assert_eq!(read.unwrap().len(), 1),
                _ => {
                    let Err(PcapError::Truncated {
                        record,
                        offset,
                        got,
                        needed,
                    }) = read
                    else {
                        panic!("{length}: {read:?}");
                    };
                    let second = length > first_end;
                    assert_eq!(record, if second { 2 } else { 1 });
                    assert_eq!(offset, if second { first_end } else { HEADER });
                    assert!(got == length - offset && got < needed, "{got} {needed}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_capture_is_refused_with_what_to_do() {
        let foreign = file(0xa1b2_3c4d, 113, &[]);
        assert_eq!(read(&foreign), Err(PcapError::Link(113)));
        let text = PcapError::Link(113).to_string();
        assert!(text.contains("113") && text.contains("276"), "{text}");

        let pcapng = file(0x0a0d_0d0a, 1, &[]);
        let error = read(&pcapng).unwrap_err();
        assert!(error.to_string().contains("tcpdump -r"), "{error}");
    }

    #[test]
    fn records_that_no_writer_makes_end_the_file() {
        for bad in [
            (5, 1_000_000_000, 3, 3),
            (5, 7, 3, 2),
            (5, 7, 300_000, 300_000),
        ] {
            let mut bytes = file(0xa1b2_3c4d, 1, &[(1, 1, b"ok", 2)]);
            let offset = bytes.len();
            let (seconds, fraction, length, original) = bad;
            let words = [seconds, fraction, length, original];
            bytes.extend(words.into_iter().flat_map(u32::to_le_bytes));
            bytes.extend([0; 300]);
            let read: Vec<_> = Pcap::new(&bytes).unwrap().collect();
            let [
                Ok(_),
                Err(PcapError::Malformed {
                    record: 2,
                    offset: at,
                    ..
                }),
            ] = read.as_slice()
            else {
                panic!("{read:?}");
            };
            assert_eq!(*at, offset);
        }
    }
}
