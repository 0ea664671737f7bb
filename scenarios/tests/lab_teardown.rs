//! A lab leaves nothing behind, whatever ends it, and touches nothing of others.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use scenarios::lab::{Daemon, Host, Lab, LabName, LabSpec, Quiet};

const SCENARIOS: &str = env!("CARGO_BIN_EXE_scenarios");

fn spec(name: &str) -> Result<LabSpec> {
    Ok(LabSpec {
        exe: SCENARIOS.into(),
        ..LabSpec::new(name.parse()?)?
    })
}

/// What of a lab exists on this machine; empty for a lab that is down.
fn traces(name: &LabName) -> Result<Vec<String>> {
    let mark = format!("segue-{name}-");
    let mut found = Vec::new();
    for entry in fs::read_dir("/run/netns").into_iter().flatten() {
        let netns = entry?.file_name().to_string_lossy().into_owned();
        if netns.starts_with(&mark) {
            found.push(format!("namespace {netns}"));
        }
    }
    let state = format!("/run/segue/{name}");
    for path in [state.clone(), format!("{state}.lock")] {
        if Path::new(&path).exists() {
            found.push(format!("file {path}"));
        }
    }
    for process in fs::read_dir("/proc")? {
        let path = process?.path();
        let mounts = fs::read_to_string(path.join("mountinfo")).unwrap_or_default();
        if mounts.contains(&format!("{state}/")) || mounts.contains(&mark) {
            found.push(format!("mount seen by {}", path.display()));
        }
    }
    Ok(found)
}

/// The network namespaces of a lab's hosts.
fn networks(lab: &Lab) -> Result<BTreeSet<u64>> {
    let inode =
        |host: &Host| Ok(fs::metadata(Path::new("/run/netns").join(host.netns_name()))?.ino());
    lab.hosts().iter().map(inode).collect()
}

/// The processes in any of these network namespaces.
fn processes_in(networks: &BTreeSet<u64>) -> Vec<PathBuf> {
    let processes = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let inside = |path: &PathBuf| {
        fs::metadata(path.join("ns/net")).is_ok_and(|meta| networks.contains(&meta.ino()))
    };
    processes.filter(inside).collect()
}

/// A namespace of somebody else, with a process in it.
struct Neighbour {
    netns: String,
    process: Child,
}

impl Neighbour {
    fn settle(netns: String) -> Result<Self> {
        ensure!(
            Command::new("ip")
                .args(["netns", "add", &netns])
                .status()?
                .success()
        );
        let mut sleep = Command::new("ip");
        sleep
            .args(["netns", "exec", &netns, "sleep", "1000"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self {
            process: sleep.spawn()?,
            netns,
        })
    }

    fn is_untouched(&mut self) -> Result<bool> {
        Ok(
            self.process.try_wait()?.is_none()
                && Path::new("/run/netns").join(&self.netns).exists(),
        )
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
        _ = Command::new("ip")
            .args(["netns", "del", &self.netns])
            .status();
    }
}

fn wait_for(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !holds()? {
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Starts `scenarios lab up` and returns once it has got as far as this step.
fn up_until(name: &LabName, step: &str) -> Result<Child> {
    let mut child = Command::new(SCENARIOS)
        .args(["lab", "up", "--without-kubernetes", "--name", name.as_str()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let stderr = child.stderr.take().context("no standard error")?;
    for line in BufReader::new(stderr).lines() {
        if line?.starts_with(step) {
            return Ok(child);
        }
    }
    anyhow::bail!("`lab up` never got to {step:?}")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn nothing_remains_of_a_lab_that_was_taken_down() -> Result<()> {
    let spec = spec("tdown")?;
    let lab = Lab::up(&spec, &Quiet).await?;
    ensure!(
        !traces(&spec.name)?.is_empty(),
        "the test sees no lab where there is one"
    );
    let networks = networks(&lab)?;
    ensure!(
        processes_in(&networks).len() > 15,
        "the test sees no processes where there are some"
    );
    // Something that the lab did not start itself, in one of its networks.
    let mut guest = lab
        .host("client")?
        .netns_command("sleep")?
        .arg("1000")
        .spawn()?;
    let hosts = lab.hosts().len();
    let swept = lab.down()?;
    assert_eq!(swept.namespaces.len(), hosts);
    assert!(
        !guest.wait()?.success(),
        "a process in the lab's network lives on"
    );
    assert_eq!(traces(&spec.name)?, Vec::<String>::new());
    assert_eq!(processes_in(&networks), Vec::<PathBuf>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn dropping_a_lab_half_way_up_takes_it_down() -> Result<()> {
    let spec = spec("tdrop")?;
    // Different moments of the way up: namespaces, hosts, daemons.
    for milliseconds in [5, 40, 100] {
        let cut =
            tokio::time::timeout(Duration::from_millis(milliseconds), Lab::up(&spec, &Quiet)).await;
        ensure!(cut.is_err(), "up in {milliseconds} ms: nothing was cut");
        assert_eq!(
            traces(&spec.name)?,
            Vec::<String>::new(),
            "after {milliseconds} ms"
        );
    }
    Ok(())
}

#[test]
#[ignore = "needs root: make test runs it"]
fn an_interrupt_takes_down_what_is_up_so_far() -> Result<()> {
    let name: LabName = "tint".parse()?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut child = up_until(&name, "Starting OVN")?;
        kill(Pid::from_raw(child.id().cast_signed()), signal)?;
        assert!(!child.wait()?.success());
        assert_eq!(traces(&name)?, Vec::<String>::new(), "after {signal}");
    }
    Ok(())
}

#[test]
#[ignore = "needs root: make test runs it"]
fn the_next_run_removes_what_a_killed_one_left_and_only_that() -> Result<()> {
    let name: LabName = "tkill".parse()?;
    let other: LabName = "tkill2".parse()?;
    // Neighbours: a namespace whose name is similar, with a process in it, and one that is not ours at all.
    let mut neighbours = [
        Neighbour::settle(other.netns("node1"))?,
        Neighbour::settle("tkill-foreign".to_owned())?,
    ];

    for step in ["Starting the hosts", "Starting OVN"] {
        let mut child = up_until(&name, step)?;
        // The lock file comes first, and is none of what has to be removed.
        let namespaces = || {
            let found = traces(&name)?;
            Ok(found.iter().any(|trace| trace.starts_with("namespace")))
        };
        wait_for("a namespace", namespaces)?;
        child.kill()?;
        child.wait()?;
        ensure!(
            namespaces()?,
            "SIGKILL left nothing behind, so nothing is tested"
        );
        // The next run of the same name.
        let up = Command::new(SCENARIOS)
            .args(["lab", "up", "--without-kubernetes", "--name", name.as_str()])
            .output()?;
        ensure!(
            up.status.success(),
            "{}",
            String::from_utf8_lossy(&up.stderr)
        );
        let said = String::from_utf8_lossy(&up.stderr).into_owned();
        ensure!(
            said.contains("left behind"),
            "it did not say what it removed: {said}"
        );
        let down = Command::new(SCENARIOS)
            .args(["lab", "down", "--name", name.as_str()])
            .output()?;
        ensure!(
            down.status.success(),
            "{}",
            String::from_utf8_lossy(&down.stderr)
        );
        assert_eq!(traces(&name)?, Vec::<String>::new(), "killed at {step:?}");
    }

    for neighbour in &mut neighbours {
        assert!(neighbour.is_untouched()?, "{} was touched", neighbour.netns);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn a_lab_in_use_is_neither_swept_nor_brought_up_again() -> Result<()> {
    let spec = spec("tuse")?;
    let lab = Lab::up(&spec, &Quiet).await?;
    let refused = Lab::up(&spec, &Quiet)
        .await
        .err()
        .context("it came up twice")?
        .to_string();
    assert!(refused.contains("in use by process"), "{refused}");
    let refused = Lab::remove(&spec.name, None)
        .err()
        .context("it was removed in use")?
        .to_string();
    assert!(refused.contains("in use by process"), "{refused}");

    // A lab that was left running for somebody is no leftover either.
    lab.keep()?;
    let refused = Lab::up(&spec, &Quiet)
        .await
        .err()
        .context("it came up twice")?
        .to_string();
    assert!(refused.contains("is up already"), "{refused}");
    let attached = Lab::attach(&spec.name)?;
    assert!(attached.hosts().iter().all(Host::is_up));
    drop(attached);
    assert!(
        Lab::attach(&spec.name)?.hosts().iter().all(Host::is_up),
        "dropping took it down"
    );

    let logs = tempfile::tempdir()?;
    Lab::remove(&spec.name, Some(logs.path()))?;
    assert!(logs.path().join("node1/ovn/ovn-controller.log").is_file());
    assert_eq!(traces(&spec.name)?, Vec::<String>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root: make test runs it"]
async fn daemons_crash_hang_and_start_again_one_by_one() -> Result<()> {
    let lab = Lab::up(
        &LabSpec {
            nodes: 2,
            ..spec("tcrash")?
        },
        &Quiet,
    )
    .await?;
    let (node1, node2) = (lab.host("node1")?, lab.host("node2")?);
    for daemon in [Daemon::OvnController, Daemon::Vswitchd, Daemon::Libvirtd] {
        let neighbour = node2.daemon(daemon)?;
        node1.crash(daemon).await?;
        assert_eq!(node1.daemon(daemon)?, None);
        assert!(
            node1.signal(daemon, Signal::SIGSTOP).is_err(),
            "{daemon} is not there"
        );
        node1.start(daemon).await?;
        assert!(
            node1.daemon(daemon)?.is_some(),
            "{daemon} did not come back"
        );
        assert_eq!(
            node2.daemon(daemon)?,
            neighbour,
            "{daemon} of the other node was touched"
        );
    }
    node1.ovs().vsctl(["show"]).await?;
    // One of two databases that are served by the same program.
    lab.central().crash(Daemon::NbDb).await?;
    lab.sbctl(["show"]).await?;
    lab.down().map(drop)
}
