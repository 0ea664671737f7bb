//! `scenarios bench blackout`, small: that every strategy hands a port over, in either topology, and that what comes of it
//! is written. How they compare is not asserted here.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use scenarios::bench::blackout::{Results, SCHEMA};
use scenarios::scenario::{Strategy, Topology};

const SCENARIOS: &str = env!("CARGO_BIN_EXE_scenarios");

fn bench(name: &str, runs: u8, out: &Path) -> Command {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let mut command = Command::new(SCENARIOS);
    command
        .args(["bench", "blackout", "--name", name, "--runs"])
        .arg(runs.to_string())
        .arg("--manifests")
        .arg(manifests)
        .arg("--out")
        .arg(out);
    command
}

#[test]
#[ignore = "needs root, and two minutes: make test runs it"]
fn every_strategy_hands_over_on_a_shared_switch() -> Result<()> {
    let results = once("tblackout", Topology::Shared, &Strategy::ALL)?;
    let segue = results.row(Topology::Shared, Strategy::Segue);
    let opened = segue.and_then(|row| row.early_opening_us.as_ref());
    assert_eq!(opened.map(|opened| opened.runs), Some(1));
    // Both chassis get everything, and one of them is not asked.
    let duplicated = |strategy: Strategy| {
        let row = results.row(Topology::Shared, strategy);
        let duplicated = row.and_then(|row| row.duplicated);
        duplicated.with_context(|| format!("duplicates of {strategy}"))
    };
    let clones = duplicated(Strategy::Clone)?;
    assert!(clones.max > 0.0, "{clones:?}");
    for strategy in [
        Strategy::Segue,
        Strategy::KubeOvn,
        Strategy::Neutron,
        Strategy::Single,
    ] {
        let duplicated = duplicated(strategy)?;
        assert!(duplicated.max <= 0.0, "{strategy}: {duplicated:?}");
    }
    Ok(())
}

/// Those whose writes there are others than on a shared switch.
#[test]
#[ignore = "needs root: make test runs it"]
fn routes_follow_in_the_routed_topology() -> Result<()> {
    let strategies = [Strategy::Segue, Strategy::OvnKubernetes];
    once("tblackoutr", Topology::Routed, &strategies).map(drop)
}

/// One migration by each strategy, and that everything that is promised of it is there.
fn once(name: &str, topology: Topology, strategies: &[Strategy]) -> Result<Results> {
    let named = match topology {
        Topology::Shared => "shared",
        Topology::Routed => "routed",
    };
    let out = tempfile::tempdir()?;
    let list: Vec<_> = strategies.iter().map(|it| it.as_str()).collect();
    let ran = bench(name, 1, out.path())
        .args(["--topologies", named, "--strategies", &list.join(",")])
        .output()?;
    let said = String::from_utf8_lossy(&ran.stderr);
    let results = fs::read(out.path().join("results.json"));
    let results = results.with_context(|| said.clone().into_owned())?;
    let results: Results = serde_json::from_slice(&results)?;
    assert_eq!(results.schema, SCHEMA);
    assert_eq!(results.failures, [], "{said}");
    let rates: Vec<_> = results.rates.iter().map(|rate| rate.topology).collect();
    assert_eq!(rates, [topology]);
    // Of one run each, all have to be valid.
    ensure!(ran.status.success(), "{:?}\n{said}", results.invalid);
    for &strategy in strategies {
        let row = results.row(topology, strategy);
        let row = row.with_context(|| format!("{strategy}, {named}"))?;
        assert_eq!(row.runs, 1, "{strategy}, {named}");
        let pause = row.pause_ms.context("a pause")?;
        assert!(pause.p50 > 0.0 && row.network_added_ms.is_some());
        let picture = out.path().join(format!("switch-{named}-{strategy}.svg"));
        assert!(fs::read_to_string(picture)?.contains(strategy.as_str()));
    }
    let runs = fs::read_to_string(out.path().join("runs.csv"))?;
    assert_eq!(runs.lines().count(), 1 + strategies.len());
    let shown = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(shown.contains("× is to segue"), "{shown}");
    assert!(!Path::new("/run/segue").join(name).exists());
    Ok(results)
}

#[test]
#[ignore = "needs root: make test runs it"]
fn an_interrupted_bench_writes_what_there_is_and_leaves_no_lab() -> Result<()> {
    let out = tempfile::tempdir()?;
    fs::write(out.path().join("results.json"), "of an earlier run")?;
    let mut child = bench("tblackoutint", 3, out.path())
        .args(["--topologies", "shared", "--strategies", "kube-ovn"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stderr = child.stderr.take().context("no standard error")?;
    let mut lines = BufReader::new(stderr).lines();
    let second = lines.find(|line| {
        let line = line.as_ref();
        line.is_ok_and(|line| line.contains("kube-ovn, 2 of 3"))
    });
    ensure!(second.is_some(), "it never came to its second migration");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
    // Read to the end, so that nothing it says can block it.
    lines.for_each(drop);
    let ended = child.wait_with_output()?;
    assert!(!ended.status.success());
    let results = fs::read(out.path().join("results.json"))?;
    let results: Results = serde_json::from_slice(&results)?;
    let row = results.row(Topology::Shared, Strategy::KubeOvn);
    let row = row.context("a row")?;
    assert_eq!(row.runs + row.invalid, 1);
    let shown = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(shown.contains("kube-ovn"), "{shown}");
    assert!(!Path::new("/run/segue/tblackoutint").exists());
    Ok(())
}
