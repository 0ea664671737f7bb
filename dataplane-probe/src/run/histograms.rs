//! The distributions of a run, as an HdrHistogram log.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use crate::clock::SECOND;

/// The distributions of a run, in µs, each with its name.
#[derive(Debug, Clone)]
pub struct Histograms {
    /// When the run began, wall clock.
    pub started_ns: u64,
    /// How long it was.
    pub length_ns: u64,
    /// Name and distribution.
    pub named: Vec<(&'static str, Histogram<u64>)>,
}

impl Histograms {
    /// Writes the HdrHistogram interval log, format V2 (compressed): one interval, the whole run, for each name, which
    /// is its tag. The column of maxima is in ms, the histograms are in µs.
    pub fn write_log(&self, out: &mut impl Write) -> io::Result<()> {
        let mut serializer = V2DeflateSerializer::new();
        let started = SystemTime::UNIX_EPOCH + Duration::from_nanos(self.started_ns);
        let mut log = IntervalLogWriterBuilder::new()
            .add_comment("[Histogram log format version 1.3]")
            .add_comment("[dataplane-probe: values in microseconds, one interval for each tag]")
            .with_start_time(started)
            .with_base_time(started)
            .with_max_value_divisor(1000.0)
            .begin_log_with(out, &mut serializer)?;
        #[expect(
            clippy::cast_precision_loss,
            reason = "seconds to three decimals are written"
        )]
        let length = Duration::from_secs_f64(self.length_ns as f64 / SECOND as f64);
        for (name, histogram) in &self.named {
            log.write_histogram(histogram, Duration::ZERO, length, Tag::new(name))
                .map_err(|error| io::Error::other(error.to_string()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;
    use crate::pace::histogram_us;

    #[test]
    fn the_log_can_be_read_back() {
        let mut histogram = histogram_us();
        histogram.record_n(150, 7).expect("in range");
        let named = vec![("round_trip", histogram.clone())];
        let mut bytes = Vec::new();
        Histograms {
            started_ns: SECOND,
            length_ns: 2 * SECOND,
            named,
        }
        .write_log(&mut bytes)
        .expect("a vector");
        let intervals: Vec<_> = IntervalLogIterator::new(&bytes)
            .map(|entry| entry.expect("well-formed"))
            .filter_map(|entry| {
                if let LogEntry::Interval(interval) = entry {
                    Some(interval)
                } else {
                    None
                }
            })
            .collect();
        assert_eq!(intervals.len(), 1);
        assert_eq!(
            intervals[0].tag().map(|tag| tag.as_str()),
            Some("round_trip")
        );
        let raw = base64_decode(intervals[0].encoded_histogram());
        let read: Histogram<u64> = Deserializer::new()
            .deserialize(&mut raw.as_slice())
            .expect("V2");
        assert_eq!(read, histogram);
    }

    /// Enough of RFC 4648 to read the log without a dependency.
    fn base64_decode(text: &str) -> Vec<u8> {
        let value = |letter: u8| match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        let letters: Vec<u8> = text
            .bytes()
            .filter(|&letter| letter != b'=')
            .map(value)
            .collect();
        let bits: Vec<u8> = letters
            .iter()
            .flat_map(|letter| (0..6).rev().map(move |bit| letter >> bit & 1))
            .collect();
        bits.chunks_exact(8)
            .map(|byte| byte.iter().fold(0, |byte, bit| byte << 1 | bit))
            .collect()
    }
}
