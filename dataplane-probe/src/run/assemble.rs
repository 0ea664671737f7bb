//! From what the threads saw to the report.

use std::net::IpAddr;

use hdrhistogram::Histogram;

use super::events::{Event, Events};
use super::receive::{Jump, State};
use super::{Account, CLOCK_STEP_NS, Collected, Heard, Histograms, connections, stream};
use crate::clock::{MICROSECOND, millis, nanos};
use crate::gaps::{Interval, Longest};
use crate::ledger::{Run, Summary};
use crate::pace::LatenessLog;
use crate::remote::{RemoteArrivals, Snapshot};
use crate::report::{
    Caller, Direction, Family, Gap, Latency, Lateness, LossRun, NewConnections, Report, SCHEMA, Tcp,
};

/// What both directions have, before it takes the report's form.
struct Parts {
    period_ns: u64,
    sent: u64,
    summary: Summary,
    longest: Longest,
    lateness: Lateness,
    receiver_overflow: u64,
    send_errors: u64,
}

pub(super) fn assemble(mut collected: Collected, events: &Events) -> (Report, Histograms) {
    let period_ns = collected.config.period_ns();
    let started_ns = collected.start.started_ns;
    let ended_ns = started_ns + collected.sent.count * period_ns;
    let mut reflector_lateness =
        LatenessLog::new(nanos(collected.config.max_late_reflector) / MICROSECOND);
    if let Ok(Account { finished, .. }) = &collected.account {
        reflector_lateness.extend(finished.lateness.iter().copied());
    }
    let to_vm = to_vm(&mut collected, ended_ns);
    let from_vm = from_vm(&mut collected, &reflector_lateness, ended_ns);
    let tcp = collected
        .tcp
        .stream
        .as_ref()
        .map(|stream| tcp(stream, &collected));
    let target = collected.config.target;
    let mut report = Report {
        schema: SCHEMA.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        target,
        family: if target.is_ipv4() {
            Family::Ipv4
        } else {
            Family::Ipv6
        },
        session: format!("{:016x}", collected.session),
        rate_hz: collected.config.rate_hz,
        packet_bytes: collected.config.packet_bytes,
        started_ns,
        ended_ns,
        valid: false,
        reasons: Vec::new(),
        to_vm,
        from_vm,
        round_trip: latency(&collected.received.round_trip),
        tcp,
        new_connections: match &collected.config.called_at {
            None => collected.tcp.connections.as_ref().map(new_connections),
            Some(_) => called_connections(&collected),
        },
        foreign: collected.received.foreign,
        callers: collected.callers.iter().map(caller).collect(),
    };
    report.reasons = reasons(&report, &collected);
    report.valid = report.reasons.is_empty();
    write_losses(&report, events);
    let mut named = vec![
        (
            "to_vm_sender_late",
            collected.sent.lateness.histogram().clone(),
        ),
        (
            "from_vm_sender_late",
            reflector_lateness.histogram().clone(),
        ),
        ("from_vm_between_arrivals", collected.received.between),
        ("round_trip", collected.received.round_trip),
    ];
    named.extend(
        collected
            .tcp
            .stream
            .map(|stream| ("stream_round_trip", stream.round_trip)),
    );
    named.extend(
        collected
            .tcp
            .connections
            .map(|connections| ("new_connection", connections.latency)),
    );
    (
        report,
        Histograms {
            started_ns,
            length_ns: ended_ns - started_ns,
            named,
        },
    )
}

fn to_vm(collected: &mut Collected, ended_ns: u64) -> Direction {
    let period_ns = collected.config.period_ns();
    let started_ns = collected.start.started_ns;
    let sent = collected.sent.count;
    let mut remote = collected
        .received
        .remote
        .take()
        .unwrap_or_else(|| RemoteArrivals::every(period_ns, started_ns));
    let (summary, overflow, mut longest) = match &collected.account {
        Ok(account) => {
            observe_account(&mut remote, account);
            let finished = &account.finished;
            let mut longest = remote.resolve(&finished.gaps, finished.unlogged_gap_ns);
            if longest.longest().is_none() {
                // Nothing came back in between: the reflector's own log is all there is.
                finished
                    .gaps
                    .iter()
                    .for_each(|gap| longest.push(on_host(gap, account)));
            }
            (finished.to_vm.clone(), finished.receiver_overflow, longest)
        }
        Err(_) => (last_word(&remote, sent), 0, remote.resolve(&[], 0)),
    };
    if summary.highest.is_none_or(|highest| highest + 1 < sent) {
        let start_ns = remote.last_ns().unwrap_or(started_ns);
        longest.push(Interval {
            start_ns,
            end_ns: ended_ns.max(start_ns),
            open: true,
            ..Interval::default()
        });
    }
    let mut lateness = collected.sent.lateness.report();
    lateness.realtime = collected.sent.realtime;
    let send_errors = collected.sent.errors;
    let parts = Parts {
        period_ns,
        sent,
        summary,
        longest,
        lateness,
        receiver_overflow: overflow,
        send_errors,
    };
    let overdue = &collected.sent.overdue;
    parts.direction(
        |interval| sender_silence_ns(interval, overdue),
        |run| {
            let start_ns = started_ns + run.first * period_ns;
            (Some(start_ns), Some(start_ns + run.count * period_ns))
        },
    )
}

fn from_vm(collected: &mut Collected, lateness: &LatenessLog, ended_ns: u64) -> Direction {
    let State {
        ledger,
        arrivals,
        overflow,
        jumps,
        from_vm_ns,
        ..
    } = &mut collected.received;
    let (highest, overflow) = (ledger.highest(), u64::from(*overflow));
    let finished = collected
        .account
        .as_ref()
        .ok()
        .map(|account| &account.finished);
    let seen = highest.map_or(0, |highest| highest + 1);
    let sent = finished.map_or(seen, |finished| finished.from_vm_sent.max(seen));
    if seen < sent || finished.is_none() {
        arrivals.expected_since(collected.start.started_ns);
        let until_ns = from_vm_ns.1.unwrap_or(ended_ns);
        arrivals.missing_until(until_ns.max(arrivals.last_ns().unwrap_or(0)));
    }
    let mut reported = lateness.report();
    if let Some(finished) = finished {
        reported.rescheduled = finished.rescheduled;
        reported.longest_reschedule_ms = millis(finished.longest_reschedule_ns);
    }
    let parts = Parts {
        period_ns: collected.config.period_ns(),
        sent,
        summary: ledger.summary(sent),
        longest: arrivals.longest().clone(),
        lateness: reported,
        receiver_overflow: overflow,
        send_errors: finished.map_or(0, |finished| finished.send_errors),
    };
    parts.direction(
        |interval| u64::from(interval.sender_late_us) * MICROSECOND,
        |run| {
            jumps
                .iter()
                .find(|jump| covers(jump, run))
                .map(|jump| (jump.before_ns, jump.after_ns))
                .unzip()
        },
    )
}

impl Parts {
    fn direction(
        self,
        late_ns: impl Fn(&Interval) -> u64,
        times: impl Fn(&Run) -> (Option<u64>, Option<u64>),
    ) -> Direction {
        let gap = |interval: &Interval| gap(interval, self.period_ns, late_ns(interval));
        let loss_run = |run: &Run| {
            let (start_ns, end_ns) = times(run);
            LossRun {
                first: run.first,
                count: run.count,
                ms: millis(run.count * self.period_ns),
                start_ns,
                end_ns,
            }
        };
        let longest = self.longest.longest().map(|interval| gap(&interval));
        Direction {
            period_us: self.period_ns / MICROSECOND,
            sent: self.sent,
            received: self.summary.received,
            lost: self.summary.lost,
            longest_loss_ms: self
                .summary
                .longest_run
                .map_or(0.0, |run| millis(run.count * self.period_ns)),
            duplicated: self.summary.duplicated,
            reordered: self.summary.reordered,
            stale: self.summary.stale,
            service_gap_ms: longest.map(|gap| gap.ms),
            service_gap_start_ns: longest.map(|gap| gap.start_ns),
            service_gap_end_ns: longest.map(|gap| gap.end_ns),
            service_gap_error_ms: longest.map_or(0.0, |gap| gap.error_ms),
            service_gap_sender_late_ms: longest.map_or(0.0, |gap| gap.sender_late_ms),
            service_gap_open: longest.is_some_and(|gap| gap.open),
            loss_run_count: self.summary.run_count,
            loss_runs: self.summary.runs.iter().map(loss_run).collect(),
            gaps: self.longest.kept().iter().map(gap).collect(),
            sender: self.lateness,
            receiver_overflow: self.receiver_overflow,
            send_errors: self.send_errors,
        }
    }
}

fn gap(interval: &Interval, period_ns: u64, sender_late_ns: u64) -> Gap {
    Gap {
        start_ns: interval.start_ns,
        end_ns: interval.end_ns,
        ms: millis(interval.length_ns().saturating_sub(period_ns)),
        error_ms: millis(interval.error_ns),
        sender_late_ms: millis(sender_late_ns.min(interval.length_ns())),
        open: interval.open,
    }
}

/// The account tells of arrivals that no packet has told of, if the last packets were lost.
///
/// It was made between the request and its answer; counting from the request places the arrivals too early by at most
/// that, rather than making up a gap.
fn observe_account(remote: &mut RemoteArrivals, account: &Account) {
    let finished = &account.finished;
    if remote
        .newest()
        .is_some_and(|newest| newest.count >= finished.to_vm.received)
    {
        return;
    }
    let newest_ns = remote.newest().map_or(0, |newest| newest.host_ns);
    remote.observe(Snapshot {
        host_ns: account.asked_ns.max(newest_ns),
        sequence: finished.from_vm_sent,
        remote_ns: finished.now_ns,
        count: finished.to_vm.received,
        highest: finished.to_vm.highest.unwrap_or(0),
        last_age_ns: finished.last_age_ns,
        first_new_age_ns: finished.first_new_age_ns,
        inner_gap_ns: finished.inner_gap_ns,
    });
}

/// Places an interval of the reflector's clock on the host's, as if the clock had not stood still since.
fn on_host(gap: &Interval, account: &Account) -> Interval {
    let place = |remote_ns: u64| {
        account
            .asked_ns
            .saturating_sub(account.finished.now_ns.saturating_sub(remote_ns))
    };
    Interval {
        start_ns: place(gap.start_ns),
        end_ns: place(gap.end_ns),
        ..*gap
    }
}

/// What is known without an account: what the last packet told. Everything else counts as lost, in one run at the end.
fn last_word(remote: &RemoteArrivals, sent: u64) -> Summary {
    let Some(newest) = remote.newest().filter(|newest| newest.count > 0) else {
        let run = Run {
            first: 0,
            count: sent,
        };
        return Summary {
            lost: sent,
            longest_run: Some(run),
            run_count: 1,
            runs: vec![run],
            ..Summary::default()
        };
    };
    let run = Run {
        first: newest.highest + 1,
        count: sent.saturating_sub(newest.highest + 1),
    };
    Summary {
        received: newest.count,
        lost: sent.saturating_sub(newest.count),
        highest: Some(newest.highest),
        longest_run: Some(run),
        run_count: 1,
        runs: vec![run],
        ..Summary::default()
    }
}

/// For how much of the interval a packet was due and not sent.
fn sender_silence_ns(interval: &Interval, overdue: &[(u64, u64)]) -> u64 {
    let overlap = |&(from, to): &(u64, u64)| {
        to.min(interval.end_ns)
            .saturating_sub(from.max(interval.start_ns))
    };
    overdue.iter().map(overlap).max().unwrap_or(0)
}

fn covers(jump: &Jump, run: &Run) -> bool {
    jump.first <= run.first && run.first + run.count <= jump.next
}

fn tcp(stream: &stream::Outcome, collected: &Collected) -> Tcp {
    let longest = stream.arrivals.longest();
    let stall = longest.longest();
    let gaps = longest.kept();
    let from_vm = collected
        .account
        .as_ref()
        .ok()
        .and_then(|account| account.finished.stream_retransmits);
    Tcp {
        survived: stream.error.is_none(),
        error: stream.error.clone(),
        longest_stall_ms: stall.map_or(0.0, |stall| {
            millis(stall.length_ns().saturating_sub(stream.period_ns))
        }),
        stall_start_ns: stall.map(|stall| stall.start_ns),
        stall_end_ns: stall.map(|stall| stall.end_ns),
        gaps: gaps.iter().map(|it| gap(it, stream.period_ns, 0)).collect(),
        last_echo_ns: stream.arrivals.last_ns(),
        retransmits: stream.retransmits + from_vm.unwrap_or(0),
        retransmits_to_vm: stream.retransmits,
        retransmits_from_vm: from_vm,
        period_us: stream.period_ns / MICROSECOND,
        bytes_sent: stream.sent,
        bytes_echoed: stream.echoed,
        round_trip: latency(&stream.round_trip),
    }
}

fn new_connections(connections: &connections::Outcome) -> NewConnections {
    NewConnections {
        attempted: connections.attempted,
        failed: connections.failed(),
        interval_ms: millis(nanos(connections.every)),
        timeout_ms: millis(nanos(connections.timeout)),
        timed_out: connections.timed_out,
        refused: connections.refused,
        reset: connections.reset,
        other: connections.other,
        first_failure_ns: connections.failures_ns.map(|(first, _)| first),
        last_failure_ns: connections.failures_ns.map(|(_, last)| last),
        error: connections.error.clone(),
        latency: latency(&connections.latency),
    }
}

/// As the reflector tells; nothing where it could not be asked.
fn called_connections(collected: &Collected) -> Option<NewConnections> {
    let finished = &collected.account.as_ref().ok()?.finished;
    let attempts = finished.connections.as_ref()?;
    Some(NewConnections {
        attempted: attempts.attempted,
        // What was still open when the account was made has waited for the whole drain.
        failed: attempts.pending
            + attempts.timed_out
            + attempts.refused
            + attempts.reset
            + attempts.other,
        interval_ms: millis(nanos(collected.config.connect_every?)),
        timeout_ms: millis(nanos(collected.config.connect_timeout)),
        timed_out: attempts.pending + attempts.timed_out,
        refused: attempts.refused,
        reset: attempts.reset,
        other: attempts.other,
        error: attempts.error.clone(),
        ..NewConnections::default()
    })
}

fn caller(&(address, heard): &(IpAddr, Heard)) -> Caller {
    Caller {
        address,
        first_ns: heard.first_ns,
        last_ns: heard.last_ns,
        packets: heard.packets,
        connections: heard.connections,
    }
}

fn latency(histogram: &Histogram<u64>) -> Option<Latency> {
    let at = |micros: u64| millis(micros * MICROSECOND);
    (!histogram.is_empty()).then(|| Latency {
        p50_ms: at(histogram.value_at_quantile(0.5)),
        p99_ms: at(histogram.value_at_quantile(0.99)),
        max_ms: at(histogram.max()),
    })
}

fn reasons(report: &Report, collected: &Collected) -> Vec<String> {
    let mut reasons = Vec::new();
    for (who, option, lateness) in [
        ("client", "--max-late-ms", &report.to_vm.sender),
        (
            "reflector",
            "--max-late-reflector-ms",
            &report.from_vm.sender,
        ),
    ] {
        if lateness.over_bound > 0 {
            reasons.push(format!(
                "the {who} sent {} packets later than {option} ({} ms) allows, the latest by {} ms: the gaps may be its \
                 own; give it a processor of its own or real-time priority",
                lateness.over_bound,
                millis(lateness.bound_us * MICROSECOND),
                millis(lateness.max_us * MICROSECOND),
            ));
        }
    }
    for (who, direction) in [("reflector", &report.to_vm), ("client", &report.from_vm)] {
        if direction.receiver_overflow > 0 {
            reasons.push(format!(
                "the {who} dropped {} packets at its own socket, which the network had delivered: it was too slow",
                direction.receiver_overflow
            ));
        }
    }
    if let Some(error) = &collected.sent.error {
        reasons.push(format!(
            "the client itself could not send {} packets ({error}), which count as lost",
            collected.sent.shortages
        ));
    }
    let reflector_shortages = collected
        .account
        .as_ref()
        .map_or(0, |account| account.finished.shortages);
    if reflector_shortages > 0 {
        reasons.push(format!(
            "the reflector itself could not send {reflector_shortages} packets, which count as lost"
        ));
    }
    if let Err(failure) = &collected.account {
        reasons.push(format!(
            "the reflector's account could not be had ({failure}): to_vm is what its last packet told, the rest counted \
             as lost; what it sent after that packet is not known"
        ));
    }
    if collected.clock_moved_ns > CLOCK_STEP_NS {
        reasons.push(format!(
            "the wall clock was set by {} ms during the run: gaps and times of day may be off by that",
            millis(collected.clock_moved_ns)
        ));
    }
    if report.to_vm.sent == 0 {
        reasons.push("it ended before a packet was sent".to_owned());
    }
    reasons
}

fn write_losses(report: &Report, events: &Events) {
    let sink = events.sink();
    for (direction, losses) in [
        ("to_vm", &report.to_vm.loss_runs),
        ("from_vm", &report.from_vm.loss_runs),
    ] {
        for run in losses {
            let LossRun {
                first,
                count,
                start_ns,
                end_ns,
                ..
            } = *run;
            sink.send(|| Event::Lost {
                direction,
                first,
                count,
                start_ns,
                end_ns,
            });
        }
    }
}
