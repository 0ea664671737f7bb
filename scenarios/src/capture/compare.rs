//! Whether a report and the capture of the same migration say the same.

use super::Figures;

/// What a report says of a migration, as far as a capture can tell it too.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reported {
    /// Packets that the client sent.
    pub sent_to_vm: u64,
    /// Packets that did not reach the reflector, wherever they were lost.
    pub lost_to_vm: u64,
    /// Copies beyond the first that reached it.
    pub duplicated_to_vm: u64,
    /// Different packets that reached the client.
    pub received_from_vm: u64,
    /// Packets that the VM sent and that did not.
    pub lost_from_vm: u64,
    /// Copies beyond the first that did.
    pub duplicated_from_vm: u64,
    /// The longest time between two arrivals from the VM, less one period.
    pub longest_gap_from_vm_ms: Option<f64>,
    /// The longest stall of the long TCP stream; none if it has not run to its end.
    pub longest_stall_ms: Option<f64>,
}

/// A figure that both have.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// What it is, in words.
    pub what: &'static str,
    /// What the capture says; none if it does not tell.
    pub captured: Option<f64>,
    /// What the report says.
    pub reported: f64,
    /// By how much they may differ.
    pub within: f64,
}

impl Comparison {
    /// Whether the two agree.
    pub fn agrees(&self) -> bool {
        self.captured
            .is_some_and(|captured| (captured - self.reported).abs() <= self.within)
    }
}

/// Holds the figures of a capture against those of the report: counts within one packet, times
/// within one period of what they are the times of.
pub fn compare(figures: &Figures, reported: &Reported) -> Vec<Comparison> {
    let (to_vm, from_vm) = (&figures.to_vm, &figures.from_vm);
    let counts = [
        ("packets sent to it", to_vm.sent, reported.sent_to_vm),
        ("packets lost towards it", to_vm.lost, reported.lost_to_vm),
        (
            "packets that reached it twice",
            to_vm.duplicated,
            reported.duplicated_to_vm,
        ),
        (
            "packets received from it",
            from_vm.received,
            reported.received_from_vm,
        ),
        ("packets lost from it", from_vm.lost, reported.lost_from_vm),
        (
            "packets from it that arrived twice",
            from_vm.duplicated,
            reported.duplicated_from_vm,
        ),
    ];
    let counts = counts
        .into_iter()
        .map(|(what, captured, reported)| Comparison {
            what,
            captured: Some(float(captured)),
            reported: float(reported),
            within: 1.0,
        });
    let gap = reported.longest_gap_from_vm_ms.map(|reported| Comparison {
        what: "the longest gap from it in ms",
        captured: figures.longest_gap.map(|gap| gap.ms),
        reported,
        within: figures.period_ms,
    });
    let stall = reported.longest_stall_ms.map(|reported| {
        let stream = figures.stream.as_ref();
        Comparison {
            what: "the longest stall of its TCP stream in ms",
            captured: stream
                .and_then(|stream| stream.longest_stall)
                .map(|stall| stall.ms),
            reported,
            within: stream.map_or(0.0, |stream| stream.period_ms),
        }
    });
    counts.chain(gap).chain(stall).collect()
}

#[allow(
    clippy::cast_precision_loss,
    reason = "so many packets are far below 2^52"
)]
fn float(count: u64) -> f64 {
    count as f64
}
