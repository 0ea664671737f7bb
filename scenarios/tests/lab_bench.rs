//! `scenarios bench flip`, small: that it measures what it says, not how fast anything is.

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
use scenarios::bench::{Method, Results, SCHEMA};

fn bench(name: &str, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scenarios"));
    command
        .args(["bench", "flip", "--sizes", "20,40", "--flips", "3"])
        .args(["--name", name, "--out"])
        .arg(out);
    command
}

/// What of a lab exists on this machine.
fn traces(name: &str) -> Vec<String> {
    let mark = format!("segue-{name}-");
    let namespaces = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let mut found: Vec<_> = namespaces
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|netns| netns.starts_with(&mark))
        .collect();
    let state = format!("/run/segue/{name}");
    found.extend(Path::new(&state).exists().then_some(state));
    found
}

#[test]
#[ignore = "needs root: make test runs it"]
fn every_method_is_measured_at_every_size_and_no_lab_remains() -> Result<()> {
    let out = tempfile::tempdir()?;
    let ran = bench("tbench", out.path()).output()?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ensure!(ran.status.success(), "{said}");

    let results: Results = serde_json::from_slice(&fs::read(out.path().join("results.json"))?)?;
    assert_eq!(results.schema, SCHEMA);
    let vms: Vec<_> = results.sizes.iter().map(|size| size.vms).collect();
    assert_eq!(vms, [20, 40]);
    for vms in vms {
        for method in Method::ALL {
            let figures = results
                .figures(vms, method)
                .with_context(|| format!("{method} with {vms} VMs"))?;
            assert_eq!(figures.flips, 4, "there and back, twice");
            for times in [figures.commit_ms, figures.sb_ms, figures.flows_ms] {
                let in_order = [times.min, times.p50, times.p99, times.max];
                assert!(in_order.is_sorted() && times.min > 0.0, "{in_order:?}");
            }
        }
    }
    let flows: Vec<_> = results
        .sizes
        .iter()
        .map(|size| size.openflow_flows)
        .collect();
    assert!(
        flows.is_sorted_by(|a, b| a < b),
        "more VMs, and {flows:?} flows"
    );

    let samples = fs::read_to_string(out.path().join("flips.csv"))?;
    assert_eq!(samples.lines().count(), 1 + 2 * (3 + 3 * 4));
    let shown = String::from_utf8_lossy(&ran.stdout).into_owned();
    let plot = fs::read_to_string(out.path().join("flip.svg"))?;
    for method in Method::ALL {
        assert!(shown.contains(method.as_str()), "{shown}");
        assert!(plot.contains(method.as_str()), "{plot}");
    }
    assert_eq!(traces("tbench"), Vec::<String>::new());
    Ok(())
}

#[test]
#[ignore = "needs root: make test runs it"]
fn an_interrupted_bench_leaves_neither_a_lab_nor_older_results() -> Result<()> {
    let out = tempfile::tempdir()?;
    fs::write(out.path().join("results.json"), "of an earlier run")?;
    let mut child = bench("tbenchint", out.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let stderr = child.stderr.take().context("no standard error")?;
    let mut lines = BufReader::new(stderr).lines();
    let flips = lines.find(|line| line.as_ref().is_ok_and(|line| line.starts_with("Flipping")));
    ensure!(flips.is_some(), "it never flipped");
    ensure!(!traces("tbenchint").is_empty(), "the test sees no lab");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
    // Read to the end, so that nothing it says can block it.
    lines.for_each(drop);
    assert!(!child.wait()?.success());
    assert_eq!(traces("tbenchint"), Vec::<String>::new());
    let results = fs::read_to_string(out.path().join("results.json")).unwrap_or_default();
    assert!(!results.contains("earlier"), "{results}");
    Ok(())
}
