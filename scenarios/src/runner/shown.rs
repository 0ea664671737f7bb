//! What a person sees of a migration with kubectl.

use std::fs;

use anyhow::{Context as _, Result};

use crate::report::{self, Check};
use crate::scenario::Outcome;

use super::Bench;
use super::checks::Checks;
use super::feeders::Followed;

/// Where what kubectl printed goes: a file of this name beside the report.
const FILE: &str = "kubectl.txt";

/// Asks kubectl for a migration that is over, keeps what it prints beside the report, and says
/// whether it tells of the handover.
pub(super) async fn check(
    bench: &Bench<'_>,
    followed: &Followed,
    migration: &report::Migration,
) -> Result<Vec<Check>> {
    let (namespace, name) = (followed.namespace.as_str(), followed.name.as_str());
    let rows = ["get", "handovers", "-A"];
    let description = ["describe", "vmim", name, "-n", namespace];
    let kubectl = bench.cluster.plane.kubectl();
    let shown_rows = kubectl.run(rows).await?;
    let described = kubectl.run(description).await?;
    let kept = format!(
        "$ kubectl {}\n{shown_rows}\n$ kubectl {}\n{described}",
        rows.join(" "),
        description.join(" ")
    );
    let out = bench.out.context("nowhere to keep what kubectl shows")?;
    let path = out.join(FILE);
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    fs::write(&path, kept).with_context(|| path.display().to_string())?;

    let mut checks = Checks::default();
    let (_, vm) = followed.domain.split_once('_').unwrap_or_default();
    let (phase, reasons) = match migration.outcome {
        Outcome::Succeeded => ("Succeeded", &["NetworkReady", "NetworkHandedOver"][..]),
        Outcome::RolledBack => ("RolledBack", &["NetworkRolledBack"][..]),
        Outcome::Failed => ("Failed", &["NetworkHandoverFailed"][..]),
    };
    let expected = [
        namespace,
        name,
        vm,
        phase,
        followed.source.as_str(),
        followed.target.as_str(),
    ];
    let row = row_of(&shown_rows, namespace, name);
    checks.that(
        format!("kubectl get handovers -A shows {}", expected.join(" ")),
        row.is_some_and(|row| row.starts_with(&expected)),
        || shown_rows.clone(),
    );
    let seen = reasons_in(&described);
    for reason in reasons {
        checks.that(
            format!("kubectl describe vmim {name} shows an Event {reason}"),
            seen.contains(reason),
            || format!("{seen:?}"),
        );
    }
    Ok(checks.0)
}

/// The words of the row that begins with a namespace and a name.
fn row_of<'a>(rows: &'a str, namespace: &str, name: &str) -> Option<Vec<&'a str>> {
    rows.lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.starts_with(&[namespace, name]))
}

/// Reasons of the Events at the end of a description, whose columns are type, reason, age, from and
/// message.
fn reasons_in(description: &str) -> Vec<&str> {
    let events = description
        .lines()
        .skip_while(|line| !line.starts_with("Events:"));
    events
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let kind = words.next()?;
            words
                .next()
                .filter(|_| matches!(kind, "Normal" | "Warning"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_of_a_handover_is_the_one_with_its_name() {
        let rows = "\
NAMESPACE   NAME               VM    PHASE        FROM    TO      WAITING FOR   SINCE   AGE
demo        web-migration-10   web   RolledBack   node2   node1                 7m      8m
demo        web-migration-1    web   Succeeded    node1   node2                 1s      9s
";
        let row = row_of(rows, "demo", "web-migration-1").unwrap();
        assert_eq!(
            row.get(2..6).unwrap(),
            ["web", "Succeeded", "node1", "node2"]
        );
        assert!(row_of(rows, "kept", "web-migration-1").is_none());
    }

    #[test]
    fn reasons_are_those_of_events() {
        let description = "\
Name:         web-migration-1
Status:
  Phase:  Succeeded
  Normal NotAnEvent
Events:
  Type     Reason                 Age   From                        Message
  ----     ------                 ----  ----                        -------
  Normal   NetworkReady           8s    segue-migration-controller  the network on node node2 is ready
  Warning  NetworkNeedsAttention  1s    segue-migration-controller  Normal or not
";
        assert_eq!(
            reasons_in(description),
            ["NetworkReady", "NetworkNeedsAttention"]
        );
        assert!(reasons_in("Events:  <none>\n").is_empty());
    }
}
