//! The report for people.

use std::fmt::Write;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};

use crate::report::{Direction, Latency, NewConnections, Report, Tcp};

/// The report as a table, and below it what it does not fit in.
pub fn render(report: &Report) -> String {
    let mut text = format!(
        "{} at {} packets/s each way, {:.1} s\n",
        report.target,
        report.rate_hz,
        seconds(report)
    );
    text.push_str(&directions(report).to_string());
    text.push('\n');
    // Writing to a string cannot fail.
    if let Some(tcp) = &report.tcp {
        text.push_str(&stream(tcp));
    }
    if let Some(connections) = &report.new_connections {
        text.push_str(&new_connections(connections));
    }
    if let Some(trip) = &report.round_trip {
        let _ = writeln!(text, "round trip       {}", latency(trip));
    }
    for caller in &report.callers {
        let _ = writeln!(
            text,
            "called from      {}: {} packets, {} connections",
            caller.address, caller.packets, caller.connections
        );
    }
    if report.foreign > 0 {
        let _ = writeln!(text, "foreign packets  {}", report.foreign);
    }
    for reason in &report.reasons {
        let _ = writeln!(text, "NOT VALID: {reason}");
    }
    text
}

fn directions(report: &Report) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["", "to the VM", "from the VM"]);
    let (to, from) = (&report.to_vm, &report.from_vm);
    let mut row = |name: &str, show: &dyn Fn(&Direction) -> String| {
        table.add_row([name.to_owned(), show(to), show(from)]);
    };
    row("sent", &|direction| direction.sent.to_string());
    row("received", &|direction| direction.received.to_string());
    row("lost", &|direction| direction.lost.to_string());
    row("longest loss", &|direction| {
        format!("{:.1} ms", direction.longest_loss_ms)
    });
    row("duplicated", &|direction| direction.duplicated.to_string());
    row("reordered", &|direction| direction.reordered.to_string());
    if to.send_errors + from.send_errors > 0 {
        row("refused by its kernel", &|direction| {
            direction.send_errors.to_string()
        });
    }
    row("service gap", &gap);
    row("sender late, p99", &|direction| {
        format!("{:.3} ms", micros(direction.sender.p99_us))
    });
    row("sender late, max", &|direction| {
        format!("{:.3} ms", micros(direction.sender.max_us))
    });
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn gap(direction: &Direction) -> String {
    let Some(gap) = direction.service_gap_ms else {
        return "unknown".to_owned();
    };
    let error = direction.service_gap_error_ms;
    let bound = if error > 0.0 {
        format!(" (up to {error:.1} less)")
    } else {
        String::new()
    };
    let open = if direction.service_gap_open {
        ", still open"
    } else {
        ""
    };
    format!("{gap:.1} ms{bound}{open}")
}

fn stream(tcp: &Tcp) -> String {
    let fate = match &tcp.error {
        None => "survived".to_owned(),
        Some(error) => format!("BROKEN ({error})"),
    };
    format!(
        "TCP stream       {fate}, longest stall {:.1} ms, {} segments retransmitted\n",
        tcp.longest_stall_ms, tcp.retransmits
    )
}

fn new_connections(connections: &NewConnections) -> String {
    let why = connections
        .error
        .as_ref()
        .map_or_else(String::new, |error| format!(" ({error})"));
    let took = connections
        .latency
        .as_ref()
        .map_or_else(String::new, |took| format!("; {}", latency(took)));
    format!(
        "new connections  {} attempted, {} failed{why}{took}\n",
        connections.attempted, connections.failed
    )
}

fn latency(latency: &Latency) -> String {
    format!(
        "p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
        latency.p50_ms, latency.p99_ms, latency.max_ms
    )
}

fn seconds(report: &Report) -> f64 {
    crate::clock::millis(report.ended_ns.saturating_sub(report.started_ns)) / 1000.0
}

fn micros(micros: u64) -> f64 {
    crate::clock::millis(micros.saturating_mul(crate::clock::MICROSECOND))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::quiet;

    #[test]
    fn shows_both_directions_apart_and_why_it_is_not_valid() {
        let mut report = quiet();
        report.to_vm.lost = 137;
        report.from_vm.duplicated = 5;
        report.reasons = vec!["the client was late".to_owned()];
        let text = render(&report);
        let row = |name: &str| {
            let cells = text
                .lines()
                .map(|line| line.split(['│', '┆']).map(str::trim).collect::<Vec<_>>());
            cells
                .into_iter()
                .find(|cells| cells.get(1) == Some(&name))
                .map(|cells| cells[2..4].join(" "))
        };
        assert_eq!(row("lost").as_deref(), Some("137 0"));
        assert_eq!(row("duplicated").as_deref(), Some("0 5"));
        assert!(text.contains("NOT VALID: the client was late"), "{text}");
    }
}
