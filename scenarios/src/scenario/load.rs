//! Reading a scenario file, and saying what is wrong with it and where.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use super::{Migrate, Scenario, Step};

/// A scenario file that cannot be run.
///
/// `Display` says what is wrong in one line; `Debug` shows the file with the place marked, for a
/// terminal.
pub struct ScenarioError {
    path: PathBuf,
    what: String,
    shown: Option<miette::Report>,
}

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.what)
    }
}

impl fmt::Debug for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.shown {
            Some(report) => fmt::Debug::fmt(report, f),
            None => fmt::Display::fmt(self, f),
        }
    }
}

impl std::error::Error for ScenarioError {}

/// Reads and checks a scenario file.
///
/// # Errors
///
/// The file cannot be read, is not YAML, has an unknown key or a wrong type (with line and column),
/// or refers to a VM or node that there is not.
pub fn load(path: &Path) -> Result<Scenario, ScenarioError> {
    let text = std::fs::read_to_string(path).map_err(|error| ScenarioError {
        path: path.to_owned(),
        what: format!("cannot be read: {error}"),
        shown: None,
    })?;
    parse(path, &text)
}

/// [`load`] for text that is in hand; `path` is for messages.
pub(super) fn parse(path: &Path, text: &str) -> Result<Scenario, ScenarioError> {
    let scenario: Scenario = serde_saphyr::from_str(text).map_err(|error| {
        let place = error.location().map_or_else(String::new, |place| {
            format!("line {}, column {}: ", place.line(), place.column())
        });
        let shown =
            serde_saphyr::miette::to_miette_report(&error, text, &path.display().to_string());
        ScenarioError {
            path: path.to_owned(),
            what: format!("{place}{}", error.without_snippet()),
            shown: Some(shown),
        }
    })?;
    check(&scenario).map_err(|what| ScenarioError {
        path: path.to_owned(),
        what,
        shown: None,
    })?;
    Ok(scenario)
}

/// Nodes that guests can run on. The lab's last node carries the client, so that what is measured
/// crosses the underlay before and after.
pub(crate) const GUEST_NODES: [&str; 2] = ["node1", "node2"];

fn check(scenario: &Scenario) -> Result<(), String> {
    let is_name = |text: &str| {
        !text.is_empty()
            && text.chars().all(|letter| {
                letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-'
            })
    };
    if !is_name(&scenario.name) {
        return Err(format!(
            "name {:?}: lower-case letters, digits and dashes only",
            scenario.name
        ));
    }
    if scenario.vms.is_empty() || scenario.steps.is_empty() {
        return Err("a scenario has at least one VM and one step".to_owned());
    }
    let mut names = BTreeSet::new();
    for vm in &scenario.vms {
        if !is_name(&vm.name) || !is_name(&vm.namespace) {
            return Err(format!("VM {}: not a Kubernetes name", vm.key()));
        }
        if !names.insert(vm.name.as_str()) {
            return Err(format!("VM {}: there are two of that name", vm.name));
        }
        node(&vm.node)?;
        if !(1..=2).contains(&vm.ports) {
            return Err(format!("VM {}: it can have 1 or 2 ports", vm.name));
        }
    }
    for step in &scenario.steps {
        check_step(step, &names)?;
    }
    Ok(())
}

fn check_step(step: &Step, vms: &BTreeSet<&str>) -> Result<(), String> {
    let known = |vm: &str| {
        vms.contains(vm)
            .then_some(())
            .ok_or_else(|| format!("a step names VM {vm:?}, which is not among the vms"))
    };
    match step {
        Step::Migrate(migrate) => known(&migrate.vm).and_then(|()| check_migrate(migrate)),
        Step::Together(migrations) => {
            let mut moving = BTreeSet::new();
            for migrate in migrations {
                known(&migrate.vm)?;
                check_migrate(migrate)?;
                if !moving.insert(&migrate.vm) {
                    return Err(format!("VM {} cannot migrate twice at once", migrate.vm));
                }
            }
            if moving.is_empty() {
                return Err("together: names no migration".to_owned());
            }
            Ok(())
        }
        Step::Quiet(quiet) => known(&quiet.vm),
        Step::Outage(outage) => known(&outage.vm),
    }
}

fn check_migrate(migrate: &Migrate) -> Result<(), String> {
    if migrate.cancel_at.is_some() && migrate.fail.is_some() {
        return Err(format!(
            "VM {}: a migration is cancelled or fails, not both",
            migrate.vm
        ));
    }
    node(&migrate.to)
}

fn node(name: &str) -> Result<(), String> {
    GUEST_NODES
        .contains(&name)
        .then_some(())
        .ok_or_else(|| format!("node {name:?}: guests run on {}", GUEST_NODES.join(" and ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::{Moment, Outcome};

    const GOOD: &str = "\
name: one
about: One VM moves.
vms:
  - {name: web, node: node1}
steps:
  - migrate: {vm: web, to: node2}
";

    fn error(text: &str) -> String {
        parse(Path::new("x.yaml"), text)
            .expect_err("the file is wrong")
            .to_string()
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let scenario = parse(Path::new("x.yaml"), GOOD).unwrap();
        assert_eq!(scenario.vms[0].key(), "demo/web");
        assert_eq!(scenario.probe.rate_hz, 1_000);
        let Step::Migrate(migrate) = &scenario.steps[0] else {
            panic!("a migration");
        };
        assert_eq!(migrate.expect.outcome, Outcome::Succeeded);
    }

    #[test]
    fn a_migration_says_what_happens_to_it() {
        let text = GOOD.replace(
            "to: node2}",
            "to: node2, kill_controller: {at: paused, restart_at: ended}, \
             expect: {outcome: RolledBack, to_vm_max_lost: 3}}",
        );
        let scenario = parse(Path::new("x.yaml"), &text).unwrap();
        let Step::Migrate(migrate) = &scenario.steps[0] else {
            panic!("a migration");
        };
        let kill = migrate.kill_controller.unwrap();
        assert_eq!(
            (kill.at, kill.restart_at),
            (Moment::Paused, Some(Moment::Ended))
        );
        assert_eq!(migrate.expect.to_vm_max_lost, Some(3));
    }

    #[test]
    fn every_file_that_ships_can_be_run() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("files");
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let scenario = load(&path).unwrap();
            assert_eq!(
                path.file_stem().unwrap().to_str(),
                Some(scenario.name.as_str())
            );
            names.insert(scenario.name);
        }
        assert!(names.contains("one-migration"), "{names:?}");
    }

    #[test]
    fn an_unknown_key_shows_its_place() {
        let message = error(&GOOD.replace("to: node2", "too: node2"));
        assert!(
            message.starts_with("x.yaml: line 6, column 24: "),
            "{message}"
        );
        assert!(message.contains("too"), "{message}");
    }

    #[test]
    fn a_wrong_type_shows_its_place() {
        let message = error(&GOOD.replace("node: node1", "node: node1, ports: many"));
        assert!(message.starts_with("x.yaml: line 4, column "), "{message}");
    }

    #[test]
    fn what_refers_to_nothing_is_named() {
        for (from, to, needle) in [
            ("vm: web", "vm: wob", "wob"),
            ("to: node2", "to: node7", "node7"),
            ("node: node1", "node: node3", "node3"),
            ("name: one", "name: One more", "One more"),
        ] {
            let message = error(&GOOD.replace(from, to));
            assert!(message.contains(needle), "{message}");
        }
    }

    #[test]
    fn one_vm_moves_once_at_a_time() {
        let text = GOOD.replace(
            "migrate: {vm: web, to: node2}",
            "together: [{vm: web, to: node2}, {vm: web, to: node1}]",
        );
        assert!(error(&text).contains("twice at once"));
    }
}
