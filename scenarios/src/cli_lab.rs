//! `scenarios lab …`

use std::{
    ffi::OsString,
    io::{Write as _, stdout},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets::NOTHING};
use scenarios::{
    cluster::{Kept, Parts, STAND_IN},
    kubernetes::Assets,
    lab::{Host, Image, Lab, LabName, LabSpec, Progress as _, Suite, Swept, Terminal},
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cli_serve::{self, KubernetesArgs},
    cli_vm::{self, VmArgs},
};

/// Arguments of `scenarios lab`.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    #[command(subcommand)]
    verb: Verb,

    /// The lab's name. Labs of different names live side by side.
    #[arg(long, global = true, env = "SEGUE_LAB", default_value_t)]
    name: LabName,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Brings a lab up and leaves it running, for a person to poke at.
    ///
    /// On the hosts run OVN, Open vSwitch and libvirt; on top of them a real kube-apiserver with the shipped
    /// manifests, the shipped migration-controller, and a stand-in for those parts of KubeVirt that drive the domains.
    /// Each role of the stand-in can be left out, so that the real component can take its place. The commands to look
    /// into the lab are printed; `lab vm` starts a VM in it.
    ///
    /// The first time this builds a Debian image (two minutes); with the image it takes seconds. What a crashed run
    /// of the same name has left behind is removed first. Ctrl-C takes down what is up so far.
    Up {
        /// Debian suite of the hosts, and with it the releases of OVN, Open vSwitch, libvirt, QEMU and the kernel.
        #[arg(long, default_value_t)]
        suite: Suite,

        /// Number of nodes, 2 or 3. The client is attached to the last one.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=3))]
        nodes: u8,

        /// Leaves Kubernetes, migration-controller and KubeVirt out: OVN, Open vSwitch and libvirt only.
        #[arg(long, conflicts_with = "without_roles")]
        without_kubernetes: bool,

        #[command(flatten)]
        kubernetes: KubernetesArgs,
    },
    /// Takes a lab down: a running one, or what a crashed run has left behind.
    Down {
        /// Copies the logs of every host, and the consoles of the guests, to this directory first.
        #[arg(long, value_name = "DIR")]
        keep_logs: Option<PathBuf>,
    },
    /// Shows hosts, daemons, Kubernetes and chassis. Fails when something is down.
    Status,
    /// Starts a VM, and prints how to migrate, watch and remove it.
    ///
    /// Creates a logical switch port, as a CNI would, and a VirtualMachineInstance with it; returns once the guest
    /// answers.
    Vm(VmArgs),
    /// Runs kubectl with all rights: `scenarios lab kubectl -- get handovers -A`.
    Kubectl {
        /// The arguments of kubectl.
        #[arg(last = true, required = true)]
        args: Vec<OsString>,
    },
    /// Opens a shell inside a host: central, node1, node2…, client.
    Shell {
        /// The host.
        host: String,
    },
    /// Runs a command inside a host: `scenarios lab exec node1 -- ovs-vsctl show`.
    Exec {
        /// The host.
        host: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Builds the image of a Debian suite, if the cache has none.
    Image {
        /// Prints the image's path on standard output.
        #[arg(long)]
        print: bool,

        /// Debian suite, such as trixie, bookworm or sid.
        #[arg(long, default_value_t)]
        suite: Suite,
    },
}

pub(crate) fn run(args: LabArgs) -> Result<ExitCode> {
    let name = args.name;
    match args.verb {
        Verb::Up {
            suite,
            nodes,
            without_kubernetes,
            kubernetes,
        } => {
            let spec = LabSpec {
                suite,
                nodes,
                ..LabSpec::new(name)?
            };
            // What is missing is told before minutes have passed.
            let parts = if without_kubernetes {
                None
            } else {
                Assets::find()?;
                Some((kubernetes.parts()?, kubernetes.with_agents()))
            };
            runtime()?.block_on(up(&spec, parts.as_ref()))?;
        }
        Verb::Down { keep_logs } => down(&name, keep_logs.as_deref())?,
        Verb::Status => return status(&Lab::attach(&name)?),
        Verb::Vm(args) => return cli_vm::run(&name, args),
        Verb::Kubectl { args } => return kubectl(&name, &args),
        Verb::Shell { host } => return exec(&name, &host, &["bash".to_owned()]),
        Verb::Exec { host, command } => return exec(&name, &host, &command),
        Verb::Image { print, suite } => {
            let image =
                runtime()?.block_on(interruptible(Image::ensure(&suite, &Terminal::default())))?;
            if print {
                writeln!(stdout(), "{}", image.dir().display())?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Runtime::new().context("tokio runtime")
}

/// Brings a lab up, with a cluster of these parts on it, if any, and with agents or not.
async fn up(spec: &LabSpec, cluster: Option<&(Parts, bool)>) -> Result<()> {
    let progress = Terminal::default();
    let bring_up = async {
        let lab = Lab::up(spec, &progress).await?;
        let kept = match cluster {
            Some((parts, agents)) => Some(cli_serve::start(&lab, parts, *agents, &progress).await?),
            None => None,
        };
        Ok((lab, kept))
    };
    let (lab, kept) = interruptible(bring_up).await?;
    drop(progress);
    let help = help(&lab, kept.as_ref())?;
    if let Some(kept) = kept {
        kept.store(lab.name())?;
    }
    lab.keep()?;
    stdout().write_all(help.as_bytes())?;
    Ok(())
}

/// Runs something to its end, or drops it, which undoes it, when the process is asked to end.
pub(crate) async fn interruptible<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
    }
}

fn down(name: &LabName, keep_logs: Option<&Path>) -> Result<()> {
    let progress = Terminal::default();
    if let Some(kept) = Kept::load(name)?.filter(Kept::is_alive) {
        progress.step(&format!("Stopping Kubernetes in lab {name}"));
        if let Err(error) = kept.stop() {
            // The teardown ends it all the same.
            eprintln!("warning: {error:#}");
        }
    }
    progress.step(&format!("Taking lab {name} down"));
    let Swept {
        namespaces,
        processes,
        ..
    } = Lab::remove(name, keep_logs)?;
    drop(progress);
    eprintln!(
        "Removed {} namespaces with {processes} processes",
        namespaces.len()
    );
    Ok(())
}

fn status(lab: &Lab) -> Result<ExitCode> {
    let central_is_up = lab.central().is_up();
    if central_is_up {
        // For the API and the controller, which listen on central's loopback. Threads inherit it.
        lab.central().enter_netns()?;
    }
    let kept = Kept::load(lab.name())?;
    let mut well = show_hosts(lab)?;
    runtime()?.block_on(async {
        if let Some(kept) = &kept {
            well &= show_cluster(kept).await?;
        }
        if central_is_up {
            writeln!(stdout(), "\n{}", lab.sbctl(["show"]).await?)?;
        }
        anyhow::Ok(())
    })?;
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Whether everything is up.
async fn show_cluster(kept: &Kept) -> Result<bool> {
    let health = kept.health().await;
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_header(["KUBERNETES", "", "ROLES"]);
    for (what, up) in &health {
        let roles = match (what.as_str(), kept.roles()) {
            (STAND_IN, []) => "none".to_owned(),
            (STAND_IN, roles) => roles.join(", "),
            _ => String::new(),
        };
        table.add_row([what.as_str(), if *up { "up" } else { "DOWN" }, &roles]);
    }
    writeln!(stdout(), "\n{table}")?;
    Ok(health.iter().all(|(_, up)| *up))
}

/// Whether everything is up.
fn show_hosts(lab: &Lab) -> Result<bool> {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_header(["HOST", "UNDERLAY", "NETNS", "DAEMONS"]);
    let mut well = true;
    for host in lab.hosts() {
        let mut daemons = Vec::new();
        for daemon in host.daemons() {
            let up = host.is_up() && host.daemon(*daemon)?.is_some();
            well &= up;
            daemons.push(format!("{daemon} {}", if up { "up" } else { "DOWN" }));
        }
        if !host.is_up() {
            well = false;
            daemons = vec!["HOST DOWN".to_owned()];
        }
        let underlay = host
            .underlay()
            .map_or_else(|| "-".to_owned(), |address| address.to_string());
        table.add_row([
            host.name(),
            &underlay,
            &host.netns_name(),
            &daemons.join(", "),
        ]);
    }
    writeln!(stdout(), "{table}")?;
    Ok(well)
}

/// The cluster of a lab.
///
/// # Errors
/// When it has none, or it is down.
pub(crate) fn kept(lab: &Lab) -> Result<Kept> {
    let name = lab.name();
    let kept = Kept::load(name)?.with_context(|| {
        format!("lab {name} has no Kubernetes: it was brought up without, or is not up yet")
    })?;
    ensure!(
        kept.is_alive(),
        "the Kubernetes of lab {name} is down: `scenarios lab down --name {name}` and `lab up` make it anew"
    );
    Ok(kept)
}

fn kubectl(name: &LabName, args: &[OsString]) -> Result<ExitCode> {
    let lab = Lab::attach(name)?;
    let mut command = kept(&lab)?.kubectl();
    lab.central().enter_netns()?;
    Err(command.args(args).exec()).context("kubectl")
}

fn exec(name: &LabName, host: &str, words: &[String]) -> Result<ExitCode> {
    let lab = Lab::attach(name)?;
    let host: &Host = lab.host(host)?;
    let (program, args) = words.split_first().context("no command given")?;
    let mut command = host.command(program);
    command.args(args);
    // Replaces this process, so that signals and the terminal go straight to the one who waits for the command.
    Err(command.exec()).context("enter the host")
}

/// How `scenarios lab` is called for a lab; a verb follows.
pub(crate) fn lab_command(name: &LabName) -> Result<String> {
    let exe = std::env::current_exe().context("path of this program")?;
    Ok(if *name == LabName::default() {
        format!("{} lab", exe.display())
    } else {
        format!("{} lab --name {name}", exe.display())
    })
}

/// The commands with which a person looks into the lab.
fn help(lab: &Lab, kept: Option<&Kept>) -> Result<String> {
    let lab_command = lab_command(lab.name())?;
    let hosts: Vec<_> = lab.hosts().iter().map(Host::name).collect();
    let mut commands = Table::new();
    commands.load_style(NOTHING);
    let mut verbs = vec![("status", "hosts, daemons, Kubernetes, chassis")];
    if kept.is_some() {
        verbs.extend([
            ("vm vm1", "starts a VM, and prints how to migrate it"),
            ("kubectl -- get handovers -A -w", "follows handovers"),
            ("kubectl -- get vmi,vmim,pods -A", "KubeVirt's objects"),
        ]);
    }
    verbs.extend([
        ("shell node1", "a shell inside a host"),
        (
            "exec central -- ovn-nbctl show",
            "the logical network, as configured",
        ),
        (
            "exec central -- ovn-sbctl show",
            "chassis, and the ports bound to them",
        ),
        ("exec node1 -- ovs-vsctl show", "the switch of a node"),
        ("exec node1 -- virsh list", "guests of a node"),
        (
            "exec node1 -- tcpdump -eni br-phys",
            "what a node and the others send each other",
        ),
        ("down", "removes it all"),
    ]);
    for (verb, what) in verbs {
        commands.add_row([format!("{lab_command} {verb}"), what.to_owned()]);
    }
    let kubectl = kept.map_or_else(String::new, |kept| {
        let central = lab.central().netns_name();
        let line = kept.kubectl_line();
        format!("kubectl without this program: ip netns exec {central} env {line}\n")
    });
    Ok(format!(
        "Lab {} is up: {}.\n\n{}\n\n\
         This machine's programs in a host's network: ip netns exec {} COMMAND\n{kubectl}\
         From central and the nodes: NB {}, SB {}. Logs: {}/HOST/var/log\n",
        lab.name(),
        hosts.join(", "),
        commands.trim_fmt(),
        lab.host("client")?.netns_name(),
        lab.nb_endpoint(),
        lab.sb_endpoint(),
        lab.name().state_dir().join("hosts").display(),
    ))
}
