//! `scenarios lab up` leaves a lab with Kubernetes to a person, and `lab down` nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const SCENARIOS: &str = env!("CARGO_BIN_EXE_scenarios");
const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A lab of this test's own, taken down however the test ends.
struct Kept(&'static str);

impl Kept {
    fn command(&self, verb: &[&str]) -> Command {
        let mut command = Command::new(SCENARIOS);
        command
            .args(["lab", "--name", self.0])
            .args(verb)
            .current_dir(REPOSITORY)
            .stdin(Stdio::null());
        command
    }

    fn up(&self, more: &[&str]) -> Result<Command> {
        let mut command = self.command(&["up"]);
        command
            .arg("--controller")
            .arg(controller()?)
            .arg("--guest-probe")
            .arg(probe()?)
            .args(more);
        Ok(command)
    }

    fn run(&self, verb: &[&str]) -> Result<String> {
        succeeded(&self.command(verb).output()?)
    }

    /// Processes of this machine whose command line or environment names the lab's state.
    fn processes(&self) -> Result<Vec<String>> {
        let state = format!("/run/segue/{}/", self.0);
        let serves = format!("lab-serve\0--name\0{}\0", self.0);
        let mut found = Vec::new();
        for process in fs::read_dir("/proc")? {
            let path = process?.path();
            let read = |file| fs::read(path.join(file)).unwrap_or_default();
            let cmdline = String::from_utf8_lossy(&read("cmdline")).into_owned();
            let environment = String::from_utf8_lossy(&read("environ")).into_owned();
            if cmdline.contains(&state) || cmdline.contains(&serves) || environment.contains(&state)
            {
                found.push(cmdline.replace('\0', " "));
            }
        }
        Ok(found)
    }

    fn assert_gone(&self) -> Result<()> {
        assert_eq!(self.processes()?, Vec::<String>::new());
        for path in [
            "/run/segue/NAME",
            "/run/segue/NAME.lock",
            "/run/netns/segue-NAME-central",
        ] {
            let path = path.replace("NAME", self.0);
            assert!(!Path::new(&path).exists(), "{path} is left");
        }
        Ok(())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        _ = self.command(&["down"]).output();
    }
}

fn succeeded(output: &Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What is given in this variable, or the program of this name beside `scenarios`.
fn built(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(given) = std::env::var_os(variable) {
        return Ok(given.into());
    }
    let beside = Path::new(SCENARIOS).with_file_name(name);
    ensure!(
        beside.is_file(),
        "`make build` makes {name}, which this test runs, or {variable} names it"
    );
    Ok(beside)
}

fn controller() -> Result<PathBuf> {
    built("SEGUE_CONTROLLER", "migration-controller")
}

fn probe() -> Result<PathBuf> {
    built("SEGUE_GUEST_PROBE", "dataplane-probe")
}

fn wait_for(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !holds()? {
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
#[ignore = "needs root: make test runs it"]
fn a_lab_is_left_running_with_kubernetes_and_taken_down_in_order() -> Result<()> {
    let lab = Kept("tkept");
    let told = succeeded(&lab.up(&["--without-role", "kubelet"])?.output()?)?;
    for command in [
        "kubectl -- get handovers -A -w",
        "ovn-nbctl show",
        "virsh list",
    ] {
        assert!(told.contains(command), "{command} is not told:\n{told}");
    }

    // The shipped CRD is served, and the stand-in has no nodes without its kubelet.
    lab.run(&["kubectl", "--", "get", "handovers", "-A"])?;
    assert_eq!(
        lab.run(&["kubectl", "--", "get", "nodes", "-o", "name"])?,
        ""
    );
    let status = lab.run(&["status"])?;
    for part in [
        "kube-apiserver",
        "migration-controller",
        "stand-in for KubeVirt",
    ] {
        let line = status
            .lines()
            .find(|line| line.contains(part))
            .context(part)?;
        assert!(line.contains(" up "), "{line}");
    }
    assert!(status.contains("virt-handler, virt-controller"), "{status}");
    assert!(!status.contains("kubelet"), "{status}");

    let log = tempfile::tempdir()?;
    let keep = log.path().to_str().context("a path")?;
    let down = lab.command(&["down", "--keep-logs", keep]).output()?;
    succeeded(&down)?;
    let complaints = String::from_utf8_lossy(&down.stderr).into_owned();
    assert!(!complaints.contains("warning"), "{complaints}");
    // It says so once it was asked to end: it was not merely killed.
    let log = fs::read_to_string(log.path().join("central/scenarios.log"))?;
    assert!(log.contains("everything has ended"), "{log}");
    lab.assert_gone()
}

#[test]
#[ignore = "needs root: make test runs it"]
fn status_fails_once_the_api_is_down() -> Result<()> {
    let lab = Kept("tkdown");
    succeeded(&lab.up(&["--nodes", "2"])?.output()?)?;
    lab.run(&["status"])?;
    let api = fs::read_dir("/proc")?.flatten().find(|process| {
        let cmdline = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).into_owned();
        cmdline.contains("kube-apiserver\0") && cmdline.contains("/run/segue/tkdown/")
    });
    let pid: i32 = api
        .context("no API")?
        .file_name()
        .to_string_lossy()
        .parse()?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    let status = lab.command(&["status"]).output()?;
    let shown = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(!status.status.success(), "{shown}");
    let line = shown.lines().find(|line| line.contains("kube-apiserver"));
    assert!(line.context("no API shown")?.contains("DOWN"), "{shown}");
    lab.run(&["down"])?;
    lab.assert_gone()
}

#[test]
#[ignore = "needs root: make test runs it"]
fn kubernetes_that_does_not_come_up_takes_the_lab_with_it() -> Result<()> {
    let lab = Kept("tkfail");
    let mut up = lab.up(&["--nodes", "2"])?;
    let nothing = tempfile::tempdir()?;
    let up = up.arg("--manifests").arg(nothing.path()).output()?;
    assert!(!up.status.success());
    let complaint = String::from_utf8_lossy(&up.stderr).into_owned();
    assert!(
        complaint.contains("Kubernetes did not come up"),
        "{complaint}"
    );
    assert!(
        complaint.contains("kustomization"),
        "the reason is told: {complaint}"
    );
    lab.assert_gone()
}

#[test]
#[ignore = "needs root: make test runs it"]
fn an_interrupt_while_kubernetes_comes_up_takes_everything_down() -> Result<()> {
    let lab = Kept("tkint");
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let mut up: Child = lab
            .up(&["--nodes", "2"])?
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        wait_for("etcd", || {
            Ok(lab
                .processes()?
                .iter()
                .any(|process| process.contains("etcd")))
        })?;
        kill(Pid::from_raw(up.id().cast_signed()), signal)?;
        assert!(!up.wait()?.success());
        if signal == Signal::SIGKILL {
            lab.run(&["down"])?;
        }
        lab.assert_gone()?;
    }
    Ok(())
}
