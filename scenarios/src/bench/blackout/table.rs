//! Results as tables for people.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::check::{Check, named};
use super::results::{Distribution, Results, Row};
use crate::report::Baseline;
use crate::scenario::Topology;

/// The results as text: a table for each topology, the failures, and the claims if there are any.
pub fn render(results: &Results) -> String {
    let environment = &results.environment;
    let mut parts = vec![format!(
        "OVN {}, OVS {}, libvirt {}, QEMU {} ({}), Kubernetes {}, Linux {}, {} CPUs",
        environment.ovn,
        environment.ovs,
        environment.libvirt,
        environment.qemu,
        environment.accel,
        environment.kubernetes,
        environment.kernel,
        environment.cpus
    )];
    for topology in results.topologies() {
        parts.push(heading(results, topology));
        parts.push(figures(results, topology));
        let rows = results.rows.iter().filter(|row| row.topology == topology);
        parts.extend(rows.filter_map(opening));
    }
    parts.push(LEGEND.to_owned());
    parts.extend(results.invalid.iter().map(|invalid| {
        let (topology, strategy) = (named(invalid.topology), invalid.strategy);
        format!(
            "invalid, and in no figure: {topology}, {strategy}, run {}: {}",
            invalid.run,
            invalid.reasons.join("; ")
        )
    }));
    parts.extend(results.rows.iter().filter(|row| !row.is_sound()).map(|row| {
        let (topology, strategy) = (named(row.topology), row.strategy);
        format!(
            "FAILED: {topology}, {strategy}: {} of {} runs are valid, and half of them have to be",
            row.runs,
            row.runs + row.invalid
        )
    }));
    parts.extend(results.failures.iter().map(|failure| {
        let (topology, strategy) = (named(failure.topology), failure.strategy);
        format!(
            "FAILED: {topology}, {strategy}, run {}: {}",
            failure.run, failure.error
        )
    }));
    parts.extend(results.checks.iter().map(verdict));
    parts.join("\n")
}

const LEGEND: &str = "\
median / 99th percentile / greatest of the runs; of fewer than a hundred the 99th percentile is the greatest.
pause: QEMU's STOP to RESUME. network added: the longest gap around it, less pause and the flow's wake.
lost, twice: packets at the rate that is said above, each way, by sequence number. TCP stall: the longest silence around
the pause; added: less pause and wake. ×: median, as a multiple of the reference's.";

fn heading(results: &Results, topology: Topology) -> String {
    let what = match topology {
        Topology::Shared => "one switch across the nodes",
        Topology::Routed => "between the nodes' switches",
    };
    let reference = results.reference(topology);
    let reference = reference.map_or_else(String::new, |row| format!("; × is to {}", row.strategy));
    let rate = results.rates.iter().find(|rate| rate.topology == topology);
    let rate = rate.map_or_else(String::new, |rate| {
        let Baseline {
            rate_hz,
            guest_busy,
            longest_tcp_stall_ms,
            ..
        } = rate.baseline;
        format!(
            "; {rate_hz} packets a second, without a migration: guest busy {:.0} %, longest TCP stall \
             {longest_tcp_stall_ms:.1} ms",
            guest_busy * 100.0
        )
    });
    format!("\n{} ({what}){reference}{rate}", named(topology))
}

fn figures(results: &Results, topology: Topology) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "strategy",
        "runs",
        "pause ms",
        "network added ms",
        "×",
        "lost to VM",
        "×",
        "lost from VM",
        "twice to VM",
        "twice from VM",
        "TCP stall ms",
        "×",
        "TCP added ms",
    ]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let reference = results.reference(topology);
    for row in results.rows.iter().filter(|row| row.topology == topology) {
        let times = |figure: fn(&Row) -> Option<Distribution>| {
            let both = figure(row).zip(reference.and_then(figure));
            both.map_or_else(none, |(own, reference)| multiple(own.p50, reference.p50))
        };
        table.add_row([
            row.strategy.to_string(),
            runs(row),
            millis(row.pause_ms),
            millis(row.network_added_ms),
            times(|row| row.network_added_ms),
            packets(row.to_vm_lost),
            times(|row| row.to_vm_lost),
            packets(row.from_vm_lost),
            packets(row.to_vm_duplicated),
            packets(row.from_vm_duplicated),
            millis(row.tcp_stall_ms),
            times(|row| row.tcp_stall_ms),
            millis(row.tcp_added_ms),
        ]);
    }
    table.to_string()
}

fn runs(row: &Row) -> String {
    let mut text = row.runs.to_string();
    for (count, what) in [(row.invalid, "invalid"), (row.failed, "FAILED")] {
        if count > 0 {
            // Writing to a string cannot fail.
            _ = write!(text, " + {count} {what}");
        }
    }
    text
}

fn millis(distribution: Option<Distribution>) -> String {
    points(distribution, |value| format!("{value:.1}"))
}

fn packets(distribution: Option<Distribution>) -> String {
    points(distribution, |value| format!("{value:.0}"))
}

fn points(distribution: Option<Distribution>, shown: impl Fn(f64) -> String) -> String {
    let Some(Distribution { p50, p99, max }) = distribution else {
        return none();
    };
    [p50, p99, max].map(shown).join(" / ")
}

fn none() -> String {
    "–".to_owned()
}

/// How many times as much one is as another. Of nothing there is no multiple, nor of what is not above noise.
fn multiple(value: f64, of: f64) -> String {
    let times = value / of;
    match times {
        _ if of <= 0.0 || value < 0.0 => none(),
        ..9.95 => format!("{times:.1}"),
        _ => format!("{times:.0}"),
    }
}

/// How long agents took to open the port, in a line.
fn opening(row: &Row) -> Option<String> {
    let opening = row.early_opening_us.as_ref()?;
    let hops = [
        ("event", opening.event),
        ("stream", opening.stream),
        ("packet-out", opening.packet_out),
        ("switch", opening.switch),
        ("together", opening.open),
        ("OVN", opening.ovn),
    ];
    let hops = hops.map(|(hop, micros)| format!("{hop} {}", packets(micros)));
    Some(format!(
        "{}: opened on the pause by its agent in {} runs, in µs: {}",
        row.strategy,
        opening.runs,
        hops.join(", ")
    ))
}

fn verdict(check: &Check) -> String {
    let Check {
        what,
        found,
        passed,
    } = check;
    let verdict = if *passed { "held" } else { "FAILED" };
    format!("{verdict}: {what}: {found}")
}

#[cfg(test)]
mod tests {
    use super::super::Run;
    use super::super::samples::{figures, run, runs};
    use super::*;
    use crate::report::Environment;
    use crate::scenario::Strategy;

    #[test]
    fn every_figure_is_shown_with_its_multiple() {
        let text = render(&Results::of(&Environment::default(), &[], &runs()));
        for shown in [
            "shared (one switch across the nodes); × is to segue",
            "routed (between the nodes' switches); × is to segue",
            "82.0 / 83.0 / 83.0",
            "2.5 / 3.5 / 3.5",
            "322.0 / 323.0 / 323.0",
            "410 / 410 / 410",
        ] {
            assert!(text.contains(shown), "{shown} is missing:\n{text}");
        }
        let line = text.lines().find(|line| line.contains("ovn-kubernetes"));
        let words: Vec<_> = line.unwrap().split_whitespace().collect();
        // 322 ms of 2.5 ms, and 410 packets of one.
        assert!(
            words.contains(&"129") && words.contains(&"410"),
            "{words:?}"
        );
    }

    #[test]
    fn failures_invalid_runs_and_claims_are_said() {
        let mut late = figures(80.0, 0.0, 0);
        late.invalid = vec!["the guest was late".to_owned()];
        let runs = [
            run(Strategy::Segue, late.clone()),
            run(Strategy::Segue, late),
            run(Strategy::Segue, figures(80.0, 0.0, 0)),
            Run {
                number: 4,
                measured: Err("the guest does not answer".to_owned()),
                ..run(Strategy::Segue, figures(0.0, 0.0, 0))
            },
        ];
        let baseline = Baseline {
            rate_hz: 500,
            guest_busy: 0.41,
            ..Baseline::default()
        };
        let baselines = [(Topology::Shared, baseline)];
        let mut results = Results::of(&Environment::default(), &baselines, &runs);
        results.check();
        let text = render(&results);
        for shown in [
            "1 + 2 invalid + 1 FAILED",
            "FAILED: shared, segue, run 4: the guest does not answer",
            "invalid, and in no figure: shared, segue, run 1: the guest was late",
            "FAILED: shared, segue: 1 of 3 runs are valid, and half of them have to be",
            "FAILED: shared: segue migrates 20 times at least, never fails, and 9 in 10 runs are valid: 3 times, of which \
             2 are invalid, and 1 failed",
            "500 packets a second, without a migration: guest busy 41 %",
            "held: shared: max of segue's duplicates is at most 0: 0",
            "FAILED: shared: p50 of the µs from the pause to segue's open port is at most 1000: not measured",
        ] {
            assert!(text.contains(shown), "{shown} is missing:\n{text}");
        }
    }

    #[test]
    fn of_nothing_there_is_no_multiple() {
        for (value, of, text) in [
            (142.0, 2.0, "71"),
            (3.0, 2.0, "1.5"),
            (3.0, 0.0, "–"),
            (3.0, -1.0, "–"),
            (-1.0, 2.0, "–"),
        ] {
            assert_eq!(multiple(value, of), text);
        }
    }
}
