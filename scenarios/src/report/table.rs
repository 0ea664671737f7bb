//! The report as a table for people.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::{Baseline, Direction, Flow, Losses, Measurement, Migration, Report};
use crate::scenario::{Opener, Outcome, PRIMARY, Peer};

/// The report as text: a table of migrations, one of other measurements, the checks that failed.
pub fn render(report: &Report) -> String {
    let mut parts = vec![heading(report), offered(report)];
    if !report.migrations.is_empty() {
        parts.push(migrations(&report.migrations));
        parts.push(LEGEND.to_owned());
        parts.extend(losses(&report.migrations));
    }
    parts.extend(openings(&report.migrations));
    parts.extend(flows(report));
    parts.extend(forbidden(report));
    parts.extend(gateways(report));
    if !report.measurements.is_empty() {
        parts.push(measurements(&report.measurements));
    }
    let invalid = report.invalid().into_iter();
    parts.extend(invalid.map(|reason| format!("invalid: {reason}")));
    parts.push(verdict(report));
    parts.join("\n")
}

const LEGEND: &str = "\
pause: QEMU's STOP to RESUME. wake: RESUME to the guest's first frame. network added: the longest
gap between arrivals around the pause, less pause and the flow's wake (± a period and the probe's own error).
lost, twice: packets towards the VM / from it. stall: the longest silence of the TCP stream around the pause;
TCP added: less pause and wake.";

fn heading(report: &Report) -> String {
    let environment = &report.environment;
    format!(
        "{}: OVN {}, OVS {}, libvirt {}, QEMU {} ({}), Kubernetes {}, Linux {}, {} CPUs",
        report.scenario,
        environment.ovn,
        environment.ovs,
        environment.libvirt,
        environment.qemu,
        environment.accel,
        environment.kubernetes,
        environment.kernel,
        environment.cpus
    )
}

/// The rate, and what it shows without a migration.
fn offered(report: &Report) -> String {
    let mut text = format!("{} packets a second each way", report.rate_hz);
    if let Some(baseline) = &report.baseline {
        let Baseline {
            rate_hz,
            guest_busy,
            longest_tcp_stall_ms,
            new_connections,
            ..
        } = baseline;
        // Writing to a string cannot fail.
        _ = write!(
            text,
            "; without a migration, at {rate_hz}: guest busy {:.0} %, longest gap {} / {} ms, longest TCP stall \
             {longest_tcp_stall_ms:.1} ms, new connections failed {}",
            guest_busy * 100.0,
            millis(baseline.to_vm_gap_ms),
            millis(baseline.from_vm_gap_ms),
            of(new_connections.failed, new_connections.attempted)
        );
    }
    for reason in &report.repeated_because {
        _ = write!(text, "\nrepeated at half the rate, because of {reason}");
    }
    text
}

/// Where packets were lost, a line for each direction in which some were.
fn losses(migrations: &[Migration]) -> Vec<String> {
    let mut lines = Vec::new();
    for migration in migrations {
        let (to_vm, from_vm) = (&migration.to_vm, &migration.from_vm);
        for (way, losses) in [("towards", to_vm.losses), ("from", from_vm.losses)] {
            if losses != Losses::default() {
                lines.push(format!(
                    "lost {way} {} on its way to {}: {} before the pause, {} at the closed port, {} in the tap's queue, {} \
                     elsewhere; {} at the receiver's socket, which the network delivered",
                    migration.vm,
                    migration.target,
                    losses.before_pause,
                    losses.at_closed_port,
                    losses.in_tap_queue,
                    losses.elsewhere,
                    losses.at_socket
                ));
            }
        }
    }
    lines
}

fn migrations(migrations: &[Migration]) -> String {
    let mut table = new_table(&[
        "VM",
        "from → to",
        "strategy",
        "outcome",
        "pause ms",
        "wake ms",
        "network added ms",
        "lost",
        "twice",
        "TCP",
        "stall ms",
        "TCP added ms",
        "new conn. failed",
    ]);
    for migration in migrations {
        table.add_row([
            migration.vm.clone(),
            format!("{} → {}", migration.source, migration.target),
            migration.strategy.clone(),
            match migration.outcome {
                Outcome::Succeeded => "succeeded",
                Outcome::RolledBack => "rolled back",
                Outcome::Failed => "FAILED",
            }
            .to_owned(),
            millis(migration.pause_ms),
            millis(migration.guest_wake_ms),
            match (migration.network_added_ms, migration.network_added_error_ms) {
                (Some(added), Some(error)) => format!("{added:.1} ± {error:.1}"),
                (added, _) => millis(added),
            },
            both(migration, |direction| direction.lost),
            both(migration, |direction| direction.duplicated),
            survived(migration.tcp.survived),
            millis(migration.tcp.stall_ms),
            millis(migration.tcp.added_ms),
            of(
                migration.new_connections.failed,
                migration.new_connections.attempted,
            ),
        ]);
    }
    table.to_string()
}

/// How agents opened ports, where they did or should have.
fn openings(migrations: &[Migration]) -> Option<String> {
    let mut table = new_table(&[
        "port opened on the pause",
        "from → to",
        "by the agent",
        "event µs",
        "stream µs",
        "packet-out µs",
        "switch µs",
        "together",
        "OVN µs",
    ]);
    for migration in migrations {
        let Some(opening) = &migration.early_opening else {
            continue;
        };
        let micros = |value: Option<i64>| value.map_or_else(|| "–".to_owned(), |it| it.to_string());
        table.add_row([
            migration.vm.clone(),
            format!("{} → {}", migration.source, migration.target),
            opening.result.clone(),
            micros(opening.event),
            micros(opening.stream),
            micros(opening.packet_out),
            micros(opening.switch),
            micros(opening.open),
            micros(opening.ovn),
        ]);
    }
    (table.row_count() > 0).then(|| table.to_string())
}

/// The flows beside the primary one, which the table of migrations has.
fn flows(report: &Report) -> Option<String> {
    let of_migrations = report.migrations.iter().map(|migration| {
        let way = format!("{} → {}", migration.source, migration.target);
        (&migration.vm, way, &migration.flows)
    });
    let of_measurements = report
        .measurements
        .iter()
        .map(|measured| (&measured.vm, measured.what.clone(), &measured.flows));
    let mut table = new_table(&[
        "VM",
        "while",
        "flow",
        "lost",
        "longest gap ms",
        "twice",
        "TCP",
        "stall ms",
        "new conn. failed",
    ]);
    for (vm, what, flows) in of_migrations.chain(of_measurements) {
        for flow in flows.iter().filter(|flow| flow.name != PRIMARY) {
            table.add_row(flow_row(vm, &what, flow));
        }
    }
    (table.row_count() > 0).then(|| table.to_string())
}

fn flow_row(vm: &str, what: &str, flow: &Flow) -> [String; 9] {
    let (to_vm, from_vm) = (&flow.to_vm, &flow.from_vm);
    [
        vm.to_owned(),
        what.to_owned(),
        format!("{}: {}", flow.name, ends(flow)),
        format!("{} / {}", to_vm.lost, from_vm.lost),
        format!(
            "{} / {}",
            millis(to_vm.service_gap_ms),
            millis(from_vm.service_gap_ms)
        ),
        format!("{} / {}", to_vm.duplicated, from_vm.duplicated),
        match flow.tcp_lived_ms {
            Some(lived) => format!("cut {lived:.0} ms after the pause"),
            None => survived(flow.tcp.survived),
        },
        format!("{:.1}", flow.tcp.longest_stall_ms),
        of(flow.new_connections.failed, flow.new_connections.attempted),
    ]
}

/// Who opens it to whom.
fn ends(flow: &Flow) -> String {
    let peer = match flow.peer {
        Peer::Client => "client",
        Peer::Outside => "outside",
    };
    let heard: Vec<_> = flow.heard_from.iter().map(ToString::to_string).collect();
    match flow.opened_by {
        Opener::Peer => format!("{peer} → {}", flow.target),
        Opener::Vm => format!("VM as {} → {peer}", heard.join(", then ")),
    }
}

fn forbidden(report: &Report) -> Vec<String> {
    let of_migrations = report.migrations.iter().flat_map(|it| &it.forbidden);
    let of_measurements = report.measurements.iter().flat_map(|it| &it.forbidden);
    let line = |flow: &super::Forbidden| {
        format!(
            "forbidden {}: {} packets and {} connections to {}: {} reached it ({} of {} before it was forbidden)",
            flow.name,
            flow.tried.sent,
            flow.tried.attempted,
            flow.target,
            flow.tried.reached,
            flow.proof.reached,
            flow.proof.sent + flow.proof.attempted
        )
    };
    of_migrations.chain(of_measurements).map(line).collect()
}

/// What the guests saw of their gateways.
fn gateways(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    for migration in &report.migrations {
        for entry in &migration.gateway {
            let unknown = || "unknown".to_owned();
            let before = entry.before.clone().unwrap_or_else(unknown);
            let after = entry.after.clone().unwrap_or_else(unknown);
            lines.push(format!(
                "{}: gateway {} was at {before} on {}, is at {after} on {}",
                migration.vm, entry.address, migration.source, migration.target
            ));
        }
    }
    lines
}

fn measurements(measurements: &[Measurement]) -> String {
    let mut table = new_table(&[
        "measured",
        "VM",
        "sent",
        "lost",
        "longest loss ms",
        "longest gap ms",
        "twice",
        "TCP",
    ]);
    for measured in measurements {
        let (to_vm, from_vm) = (&measured.to_vm, &measured.from_vm);
        table.add_row([
            measured.what.clone(),
            measured.vm.clone(),
            format!("{} / {}", to_vm.sent, from_vm.sent),
            format!("{} / {}", to_vm.lost, from_vm.lost),
            format!(
                "{:.1} / {:.1}",
                to_vm.longest_loss_ms, from_vm.longest_loss_ms
            ),
            format!(
                "{} / {}",
                millis(to_vm.service_gap_ms),
                millis(from_vm.service_gap_ms)
            ),
            format!("{} / {}", to_vm.duplicated, from_vm.duplicated),
            survived(measured.tcp.survived),
        ]);
    }
    table.to_string()
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(header.iter().copied());
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn millis(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.1}"))
}

fn both(migration: &Migration, figure: impl Fn(&Direction) -> u64) -> String {
    format!(
        "{} / {}",
        figure(&migration.to_vm),
        figure(&migration.from_vm)
    )
}

fn survived(survived: bool) -> String {
    if survived { "survived" } else { "BROKEN" }.to_owned()
}

fn of(failed: u64, attempted: u64) -> String {
    format!("{failed} of {attempted}")
}

fn verdict(report: &Report) -> String {
    let failed: Vec<_> = report
        .checks
        .iter()
        .filter_map(|check| {
            let failure = check.failure.as_ref()?;
            Some(format!("FAILED: {}: {failure}", check.what))
        })
        .collect();
    if failed.is_empty() && report.passed {
        format!(
            "{}: all {} checks held",
            report.scenario,
            report.checks.len()
        )
    } else if failed.is_empty() {
        format!("{}: FAILED before it came to an end", report.scenario)
    } else {
        failed.join("\n")
    }
}
