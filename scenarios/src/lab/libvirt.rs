//! A node's libvirt, and migrations between two of them.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use libvirt_rpc::Connection;
use nix::sys::signal::Signal;
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    daemon::Daemon,
    events::{self, Event, Kind, Lifecycle},
    exec::{output, output_within},
    host::{Host, wait_until},
    proc::ProcessId,
};

/// The driver of every guest.
pub(crate) const URI: &str = "qemu:///system";
/// libvirt's socket in a node.
pub(crate) const SOCKET: &str = "/run/libvirt/libvirt-sock";

/// A migration that takes longer hangs: a stretched pre-copy of a small guest takes a minute or two.
const MIGRATION_DEADLINE: Duration = Duration::from_mins(5);

/// The libvirt of a node.
#[derive(Clone, Copy, Debug)]
pub struct Libvirt<'a>(&'a Host);

/// How a migration is to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrateOptions {
    /// Most that is copied per second, in MiB. Small values stretch pre-copy, so that there is time to do something.
    pub bandwidth_mib: Option<u32>,
    /// What goes wrong.
    pub fault: Option<Fault>,
}

/// Something that goes wrong in a migration, on purpose and without fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The target's QEMU dies after everything is copied and the source is paused, before the target runs. The
    /// migration fails, and the source resumes.
    ///
    /// Once copying has begun, nobody needs the target's libvirt until the source asks it to start the guest; so it is
    /// stopped (SIGSTOP) at the beginning, the target's QEMU is killed when the source's says that everything is
    /// copied, and then libvirt goes on (SIGCONT) and finds its guest dead. No step of this depends on being fast,
    /// except the first: copying must take longer than the stop, which a bandwidth of 16 MiB/s ensures. The fault
    /// fails with an error where it did not.
    TargetDiesAtSwitchover,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs on the target.
    Completed,
    /// libvirt gave up, or was told to; this is what it says.
    Failed(String),
}

/// A migration in progress. Dropping it does not end it.
#[derive(Debug)]
pub struct MigrationJob {
    source: Host,
    domain: String,
    migration: JoinHandle<Outcome>,
    fault: Option<JoinHandle<Result<()>>>,
}

/// Cancels a migration.
#[derive(Clone, Debug)]
pub struct Aborter {
    source: Host,
    domain: String,
}

// === impl Libvirt ===

impl<'a> Libvirt<'a> {
    pub(crate) fn new(host: &'a Host) -> Self {
        Self(host)
    }

    /// Runs `virsh` with these arguments.
    pub async fn virsh<I, S>(&self, args: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = self.0.command("virsh");
        command.args(["--quiet", "--connect", URI]).args(args);
        output(command)
            .await
            .with_context(|| self.0.name().to_owned())
    }

    /// The QEMU process of a domain, if it runs here.
    pub fn qemu(&self, domain: &str) -> Result<Option<ProcessId>> {
        // libvirt's name of a guest in QEMU's arguments, between "guest=" and a comma.
        let mark = format!("guest={domain},");
        let found = self.0.processes()?.into_iter().find(|process| {
            process.is_guest() && process.cmdline.iter().any(|word| word.starts_with(&mark))
        });
        Ok(found.map(|process| process.id))
    }
}

/// Configures and starts a node's libvirt and returns once it answers.
pub(super) async fn start(node: &Host, index: u8) -> Result<()> {
    // Two hosts of one identity refuse to migrate to "themselves", and hosts on one machine share the firmware's.
    let identity = format!("00000000-0000-0000-0000-0000000000{index:02x}");
    node.create_file(
        "/etc/libvirt/libvirtd.conf",
        &format!(
            "host_uuid = \"{identity}\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n\
             listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\n"
        ),
    )?;
    // No security driver, cgroups or namespaces: the host is all the isolation there is.
    node.create_file(
        "/etc/libvirt/qemu.conf",
        "security_driver = \"none\"\nuser = \"root\"\ngroup = \"root\"\ncgroup_controllers = []\nnamespaces = []\n\
         stdio_handler = \"file\"\nremember_owner = 0\n",
    )?;
    node.start(Daemon::Libvirtd).await?;
    answers(node).await
}

/// Returns once the node's libvirt answers.
async fn answers(node: &Host) -> Result<()> {
    let socket = node.path(SOCKET);
    wait_until(&format!("libvirt's socket on {}", node.name()), || {
        Ok(socket.exists())
    })
    .await?;
    let connection = Connection::open(&socket, URI).await;
    connection
        .map(drop)
        .with_context(|| socket.display().to_string())
}

// === impl Aborter ===

impl Aborter {
    /// Cancels the migration: the guest stays where it is, and [`MigrationJob::wait`] says that it failed.
    ///
    /// # Errors
    /// When there is nothing to cancel: not begun yet, or over.
    pub async fn abort(&self) -> Result<()> {
        self.source
            .libvirt()
            .virsh(["domjobabort", &self.domain])
            .await
            .map(drop)
    }
}

// === impl MigrationJob ===

/// Starts the live migration of a domain, run by the source's libvirt ("peer to peer"). The domain's interfaces must
/// exist on the target ([`Guest::plug`](super::Guest::plug)).
///
/// # Errors
/// When it cannot be started; how it ends is told by [`MigrationJob::wait`].
pub async fn migrate(
    source: &Host,
    target: &Host,
    domain: &str,
    options: MigrateOptions,
) -> Result<MigrationJob> {
    let address = target
        .management()
        .with_context(|| format!("{} cannot be a target", target.name()))?;
    let preference = prefer_at_start(target, domain).await?;
    let fault = match options.fault {
        Some(Fault::TargetDiesAtSwitchover) => {
            let (sender, receiver) = mpsc::unbounded_channel();
            let follower = events::follow(source, sender).await?;
            let (target, domain) = (target.clone(), domain.to_owned());
            Some(tokio::spawn(async move {
                let _follower = follower;
                kill_at_switchover(receiver, &target, &domain).await
            }))
        }
        None => None,
    };
    let mut command = source.command("virsh");
    command.args(["--quiet", "--connect", URI, "migrate", "--live", "--p2p"]);
    let bandwidth = options.bandwidth_mib.or(options.fault.map(|_| 16));
    command.args(bandwidth.map(|mib| format!("--bandwidth={mib}")));
    command
        .arg(domain)
        .arg(format!("qemu+tcp://{address}/system"))
        .arg(format!("tcp://{address}"));
    let migration = tokio::spawn(async move {
        let outcome = match output_within(command, MIGRATION_DEADLINE).await {
            Ok(_) => Outcome::Completed,
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        // Where the target never started, nothing else ends it.
        preference.abort();
        outcome
    });
    Ok(MigrationJob {
        source: source.clone(),
        domain: domain.to_owned(),
        migration,
        fault,
    })
}

impl MigrationJob {
    /// A handle to cancel the migration with while somebody else waits for it.
    pub fn aborter(&self) -> Aborter {
        Aborter {
            source: self.source.clone(),
            domain: self.domain.clone(),
        }
    }

    /// Returns when the migration is over, with its outcome.
    ///
    /// # Errors
    /// When a fault that was asked for did not happen as it should.
    pub async fn wait(self) -> Result<Outcome> {
        let outcome = self.migration.await.context("migration")?;
        if let Some(fault) = self.fault {
            fault
                .await
                .context("fault")?
                .context("the fault at switch-over")?;
        }
        Ok(outcome)
    }
}

/// Gives the target's QEMU its precedence as soon as it exists: before it receives anything.
async fn prefer_at_start(target: &Host, domain: &str) -> Result<JoinHandle<()>> {
    let (sender, mut events) = mpsc::unbounded_channel();
    let follower = events::follow(target, sender).await?;
    let (target, domain) = (target.clone(), domain.to_owned());
    Ok(tokio::spawn(async move {
        let _follower = follower;
        while let Some(event) = events.recv().await {
            let started = Kind::Lifecycle(Lifecycle::Started { migrated: true });
            if event.domain == domain && event.kind == started {
                if let Err(error) = target.prefer() {
                    tracing::warn!("{error:#}");
                }
                return;
            }
        }
    }))
}

async fn kill_at_switchover(
    mut source: mpsc::UnboundedReceiver<Event>,
    target: &Host,
    domain: &str,
) -> Result<()> {
    migration_status(&mut source, domain, "active").await?;
    target.signal(Daemon::Libvirtd, Signal::SIGSTOP)?;
    let killed = async {
        migration_status(&mut source, domain, "completed").await?;
        let qemu = target.libvirt().qemu(domain)?;
        let qemu = qemu.with_context(|| format!("{domain} does not run on {}", target.name()))?;
        qemu.signal(Signal::SIGKILL)?;
        wait_until(&format!("{domain}'s QEMU to end"), || Ok(!qemu.is_alive())).await
    }
    .await;
    target.signal(Daemon::Libvirtd, Signal::SIGCONT)?;
    killed
}

/// Reads events until QEMU says that the migration has this status.
async fn migration_status(
    source: &mut mpsc::UnboundedReceiver<Event>,
    domain: &str,
    wanted: &str,
) -> Result<()> {
    while let Some(event) = source.recv().await {
        if event.domain != domain {
            continue;
        }
        match event.migration_status() {
            Some(status) if status == wanted => return Ok(()),
            Some(status @ ("completed" | "failed" | "cancelled")) => {
                bail!("the migration of {domain} was {status} before it was {wanted}")
            }
            _ => {}
        }
    }
    Err(anyhow!(
        "no more events while waiting for the migration of {domain} to be {wanted}"
    ))
}
