//! What was measured: `segue.bench-flip/v1`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::Method;
use super::databases::Times;

/// The name and version of the format. Within it fields are only ever added.
pub const SCHEMA: &str = "segue.bench-flip/v1";

/// How many times as long as with [`SMALL`] VMs an address-set move may take with [`LARGE`].
const MOST_GROWTH: f64 = 3.0;
/// How many times as long as an address-set move a static-route edit must take with [`LARGE`] VMs.
const LEAST_GAIN: f64 = 100.0;
/// The smaller number of VMs that the checks compare.
pub const SMALL: u32 = 100;
/// The larger number of VMs that the checks compare.
pub const LARGE: u32 = 10_000;

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: String,
    /// What it ran on.
    pub environment: Environment,
    /// The numbers of VMs that there were, in turn.
    pub sizes: Vec<Size>,
    /// What was measured, by number of VMs and method.
    pub rows: Vec<Row>,
    /// The claims that these figures are to bear out; those only for which there are figures.
    pub checks: Vec<Check>,
}

/// What a run ran on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of OVN's Debian package.
    pub ovn: String,
    /// Version of Open vSwitch's Debian package.
    pub ovs: String,
    /// Processors of the machine.
    pub cpus: usize,
    /// What the first of them calls itself.
    pub cpu: String,
    /// Kernel release of the machine.
    pub kernel: String,
    /// Nodes of the network: one with a chassis, the others rows.
    pub nodes: u8,
}

/// The network with so many VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    /// How many VMs.
    pub vms: u32,
    /// How long it took to add those that were not there yet, until the flows were installed.
    pub load_s: f64,
    /// How many flows the watched node's integration bridge then had.
    pub openflow_flows: u64,
    /// What a change of nothing takes: the least that any method can.
    pub nothing: Figures,
}

/// One method with so many VMs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// How many VMs.
    pub vms: u32,
    /// The method.
    pub method: Method,
    /// How often.
    #[serde(flatten)]
    pub figures: Figures,
}

/// How long something took, each counted from the moment before the commit was sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// How often it was done.
    pub flips: usize,
    /// Until the Northbound server acknowledged the commit.
    pub commit_ms: Distribution,
    /// Until northd said that the Southbound is up to date: `NB_Global.sb_cfg`.
    pub sb_ms: Distribution,
    /// Until the watched node's ovn-controller said that the flows are installed: `Chassis_Private.nb_cfg`.
    pub flows_ms: Distribution,
}

/// Times in milliseconds. Of fewer than a hundred, the 99th percentile is the longest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// The shortest.
    pub min: f64,
    /// The median.
    pub p50: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// A claim, and whether it held.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What is compared.
    pub what: String,
    /// How many times as long the one takes as the other.
    pub ratio: f64,
    /// What is asked of the ratio.
    pub limit: String,
    /// Whether it held.
    pub passed: bool,
}

// === impl Results ===

impl Results {
    pub(super) fn new(environment: Environment) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            environment,
            sizes: Vec::new(),
            rows: Vec::new(),
            checks: Vec::new(),
        }
    }

    /// What was measured of a method with so many VMs.
    pub fn figures(&self, vms: u32, method: Method) -> Option<&Figures> {
        self.rows
            .iter()
            .find(|row| row.vms == vms && row.method == method)
            .map(|row| &row.figures)
    }

    /// Holds the claims against what has been measured so far.
    pub(super) fn check(&mut self) {
        let median = |vms, method| self.figures(vms, method).map(|row| row.sb_ms.p50);
        let small = median(SMALL, Method::AddressSet);
        let large = median(LARGE, Method::AddressSet);
        let edit = median(LARGE, Method::StaticRoute);
        self.checks = [
            small.zip(large).map(|(small, large)| {
                let ratio = large / small;
                Check {
                    what: format!(
                        "address-set to the Southbound, median with {LARGE} VMs over that with {SMALL}"
                    ),
                    ratio,
                    limit: format!("at most {MOST_GROWTH}"),
                    passed: ratio <= MOST_GROWTH,
                }
            }),
            edit.zip(large).map(|(edit, large)| {
                let ratio = edit / large;
                Check {
                    what: format!(
                        "static-route to the Southbound with {LARGE} VMs, median over address-set's"
                    ),
                    ratio,
                    limit: format!("at least {LEAST_GAIN}"),
                    passed: ratio >= LEAST_GAIN,
                }
            }),
        ]
        .into_iter()
        .flatten()
        .collect();
    }
}

// === impl Figures ===

impl Figures {
    pub(super) fn of(times: &[Times]) -> Result<Self> {
        Ok(Self {
            flips: times.len(),
            commit_ms: Distribution::of(times.iter().map(|times| times.commit))?,
            sb_ms: Distribution::of(times.iter().map(|times| times.sb))?,
            flows_ms: Distribution::of(times.iter().map(|times| times.flows))?,
        })
    }
}

// === impl Distribution ===

impl Distribution {
    /// The longest that is told apart, in µs.
    const HOUR: u64 = 3_600_000_000;

    fn of(times: impl Iterator<Item = Duration>) -> Result<Self> {
        let mut histogram =
            Histogram::<u64>::new_with_bounds(1, Self::HOUR, 3).context("bounds of a histogram")?;
        for time in times {
            let micros = u64::try_from(time.as_micros()).unwrap_or(Self::HOUR);
            histogram.saturating_record(micros);
        }
        #[expect(clippy::cast_precision_loss, reason = "an hour in µs fits")]
        let millis = |micros: u64| micros as f64 / 1000.0;
        Ok(Self {
            min: millis(histogram.min()),
            p50: millis(histogram.value_at_quantile(0.5)),
            p99: millis(histogram.value_at_quantile(0.99)),
            max: millis(histogram.max()),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn figures(median: f64) -> Figures {
        let distribution = Distribution {
            min: median / 2.0,
            p50: median,
            p99: median * 2.0,
            max: median * 2.0,
        };
        Figures {
            flips: 50,
            commit_ms: distribution,
            sb_ms: distribution,
            flows_ms: distribution,
        }
    }

    /// Made-up results: medians of the methods with 100 and with 10,000 VMs.
    pub(in super::super) fn results(address_set: [f64; 2], static_route: [f64; 2]) -> Results {
        let mut results = Results::new(Environment::default());
        for (at, vms) in [SMALL, LARGE].into_iter().enumerate() {
            results.sizes.push(Size {
                vms,
                load_s: 1.0,
                openflow_flows: 1000,
                nothing: figures(0.3),
            });
            for (method, median) in [
                (Method::AddressSet, address_set[at]),
                (Method::Lsp, 5.0),
                (Method::StaticRoute, static_route[at]),
            ] {
                let figures = figures(median);
                results.rows.push(Row {
                    vms,
                    method,
                    figures,
                });
            }
        }
        results.check();
        results
    }

    fn held(results: &Results) -> Vec<bool> {
        results.checks.iter().map(|check| check.passed).collect()
    }

    #[test]
    fn the_claims_hold_up_to_their_limits_and_not_beyond() {
        assert_eq!(held(&results([1.0, 3.0], [30.0, 300.0])), [true, true]);
        assert_eq!(held(&results([1.0, 3.1], [30.0, 310.0])), [false, true]);
        assert_eq!(held(&results([1.0, 3.0], [30.0, 299.0])), [true, false]);
    }

    #[test]
    fn nothing_is_claimed_of_what_was_not_measured() {
        let mut results = results([1.0, 1.0], [30.0, 3000.0]);
        results.rows.retain(|row| row.vms == SMALL);
        results.check();
        assert_eq!(results.checks, []);
    }

    #[test]
    fn percentiles_are_those_of_the_times() {
        let times = (1..=200).map(Duration::from_millis);
        let distribution = Distribution::of(times).unwrap();
        let near = |value: f64, wanted: f64| (value - wanted).abs() <= wanted / 500.0;
        assert!(near(distribution.min, 1.0), "{distribution:?}");
        assert!(near(distribution.p50, 100.0), "{distribution:?}");
        assert!(near(distribution.p99, 198.0), "{distribution:?}");
        assert!(near(distribution.max, 200.0), "{distribution:?}");
    }

    #[test]
    fn the_format_is_what_its_readers_expect() {
        let json = serde_json::to_value(results([1.0, 1.0], [30.0, 3000.0])).unwrap();
        assert_eq!(json["schema"], "segue.bench-flip/v1");
        let row = &json["rows"][2];
        assert_eq!(row["vms"], 100);
        assert_eq!(row["method"], "static-route");
        assert_eq!(row["flips"], 50);
        for column in ["commit_ms", "sb_ms", "flows_ms"] {
            assert_eq!(row[column]["p50"], 30.0);
            assert_eq!(row[column]["p99"], 60.0);
        }
    }
}
