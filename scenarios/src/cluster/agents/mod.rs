//! The shipped agents, one on every node, each with the rights that its manifest asks for and no more.

mod certificates;
mod manifest;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use crate::kubernetes::ControlPlane;
use crate::kubevirt::Plugin;
use crate::lab::contain::Contained;
use crate::lab::{Host, Lab};

use super::{http, tail_of};
use manifest::Manifest;

pub(crate) use certificates::{OF_CONTROLLER, issue};

/// Where the controller listens for agents, on all of central's addresses.
pub(crate) const AGENTS_PORT: u16 = 9465;
/// Where the agents are in Kubernetes: as in `manifests/agent`.
const NAMESPACE: &str = "segue-agents";
const DAEMON_SET: &str = "node-hooks";
const PLUGIN: &str = "segue";
/// Where every agent serves metrics and probes: its default.
const METRICS_PORT: u16 = 9466;
/// A start takes a fraction of a second; the rest is for a busy machine, and for the agent's own pauses between attempts
/// to reach a controller, up to eight seconds.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// `terminationGracePeriodSeconds` of the manifest.
const GRACE: Duration = Duration::from_secs(10);
/// Whose directory below the kubelet's is the place of libvirt's socket: that of all the node's guests.
const LAUNCHER: &str =
    "/var/lib/kubelet/pods/lab/volumes/kubernetes.io~empty-dir/libvirt-runtime/libvirt-sock";
/// The manager of fields that nobody else writes.
const MANAGER: &str = "scenarios";
/// Packets between a node and the controller's port for agents are dropped here.
const CUT: &str = "inet segue_agent_cut";

/// How the gate is to be, where not as shipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hook {
    /// For how long an agent waits for the controller's word.
    pub deadline: Option<Duration>,
    /// Whether a migration fails for which the controller says nothing in that time; it goes otherwise.
    pub fails_on_timeout: bool,
    /// Whether what the gate refuses fails the step; it goes on otherwise.
    pub refusal_counts: bool,
}

/// The agents of a lab.
pub struct Agents {
    program: PathBuf,
    controller: String,
    nodes: Vec<Host>,
    manifest: Manifest,
    /// As it is shipped.
    plugin: Plugin,
    client: Client,
    hook: Hook,
    running: BTreeMap<String, Contained>,
}

impl Agents {
    /// Applies the agents' manifests; nothing runs yet, and no plugin asks for it.
    ///
    /// # Errors
    /// When there is no such program, the API refuses a manifest, or it asks for something that the lab does not give.
    pub(super) async fn install(
        lab: &Lab,
        plane: &ControlPlane,
        manifests: &Path,
        program: &Path,
    ) -> Result<Self> {
        ensure!(
            program.is_file(),
            "there is no {}: `make build` builds it, --node-hooks names another place",
            program.display()
        );
        let kubectl = plane.kubectl();
        for dir in ["agent", "agent/plugin"] {
            kubectl.apply_kustomization(&manifests.join(dir)).await?;
        }
        let client = plane.client();
        let sets: Api<DaemonSet> = Api::namespaced(client.clone(), NAMESPACE);
        let set = sets
            .get(DAEMON_SET)
            .await
            .context("the agents' DaemonSet")?;
        let manifest = Manifest::of(&set)
            .with_context(|| format!("DaemonSet {NAMESPACE}/{DAEMON_SET}, as applied"))?;
        let plugins: Api<Plugin> = Api::all(client.clone());
        let plugin = plugins.get(PLUGIN).await.context("the agents' Plugin")?;
        let address = lab.central().management();
        let address = address.context("central has no address")?;
        let agents = Self {
            program: program.to_owned(),
            controller: format!("{address}:{AGENTS_PORT}"),
            nodes: lab.nodes().cloned().collect(),
            manifest,
            plugin,
            client,
            hook: Hook::default(),
            running: BTreeMap::new(),
        };
        agents.remove_plugin().await?;
        Ok(agents)
    }

    /// Starts all that do not run, and returns once they are ready and have a controller. With another gate than before
    /// all are started anew.
    pub(super) async fn start_all(&mut self, hook: Hook) -> Result<()> {
        if hook != self.hook {
            self.stop_all().await?;
            self.hook = hook;
        }
        let missing: Vec<_> = self
            .nodes
            .iter()
            .map(Host::name)
            .map(str::to_owned)
            .collect();
        for node in missing {
            if !self.running.contains_key(&node) {
                self.start(&node).await?;
            }
        }
        self.apply_plugin().await?;
        self.settled().await
    }

    /// Ends all, and the gate with them; goes on after an error and returns the first.
    pub(super) async fn stop_all(&mut self) -> Result<()> {
        let unplugged = if self.running.is_empty() {
            Ok(())
        } else {
            self.remove_plugin().await
        };
        let mut stopped = Ok(());
        while let Some((node, agent)) = self.running.pop_first() {
            let ended = self.end(&node, agent).await;
            stopped = stopped.and(ended.with_context(|| format!("the agent of {node}")));
        }
        stopped.and(unplugged)
    }

    /// Starts the agent of a node, and returns once it is ready.
    ///
    /// # Errors
    /// When it runs already, ends, or is not ready in time, with the end of its log.
    pub async fn start(&mut self, node: &str) -> Result<()> {
        ensure!(
            !self.running.contains_key(node),
            "the agent of {node} runs already"
        );
        let host = self.host(node)?.clone();
        let container = self.manifest.on(&host, &self.program, &self.options())?;
        show_libvirt(&host)?;
        let path = log_of(&host);
        let log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        let started = Contained::start(&host, &container, log).await;
        let agent = started.with_context(|| format!("the agent of {node}{}", tail_of(&path)))?;
        self.running.insert(node.to_owned(), agent);
        self.ready(&host).await
    }

    /// Kills the agent of a node, as a crash would, and returns once it is gone.
    pub async fn crash(&mut self, node: &str) -> Result<()> {
        let agent = self.running.remove(node);
        let agent = agent.with_context(|| format!("the agent of {node} does not run"))?;
        agent.kill().await
    }

    /// Has it stand still (SIGSTOP).
    pub fn freeze(&self, node: &str) -> Result<()> {
        self.agent(node)?.signal(Signal::SIGSTOP)
    }

    /// Has it go on (SIGCONT).
    pub fn thaw(&self, node: &str) -> Result<()> {
        self.agent(node)?.signal(Signal::SIGCONT)
    }

    /// Ends it as Kubernetes does.
    pub async fn stop(&mut self, node: &str) -> Result<()> {
        let agent = self.running.remove(node);
        let agent = agent.with_context(|| format!("the agent of {node} does not run"))?;
        self.end(node, agent).await
    }

    /// Drops every packet between it and the controller, without a word to either.
    pub async fn cut(&self, node: &str) -> Result<()> {
        let chain = |name: &str, port: &str| {
            format!(
                "add chain {CUT} {name} {{ type filter hook {name} priority 0; }}; \
                 add rule {CUT} {name} tcp {port} {AGENTS_PORT} drop"
            )
        };
        let commands = format!(
            "add table {CUT}; {}; {}",
            chain("output", "dport"),
            chain("input", "sport")
        );
        let cut = self.host(node)?.run("nft", [commands]).await;
        cut.map(drop).context("cut an agent off")
    }

    /// Lets the packets through again.
    pub async fn mend(&self, node: &str) -> Result<()> {
        // Deleting what is not there is an error, adding what is there is none.
        let commands = format!("add table {CUT}; delete table {CUT}");
        let mended = self.host(node)?.run("nft", [commands]).await;
        mended.map(drop).context("connect an agent again")
    }

    /// Returns once every agent that runs is ready and has a stream to the controller.
    ///
    /// # Errors
    /// When one has ended or has none in time, with the end of its log.
    pub async fn settled(&mut self) -> Result<()> {
        let nodes: Vec<_> = self.running.keys().cloned().collect();
        for node in nodes {
            let host = self.host(&node)?.clone();
            self.ready(&host).await?;
            let connected = || async {
                let metrics = self.metrics(&node).await?;
                Ok(sample(&metrics, "segue_agent_controller_connected") == Some(1.0))
            };
            wait_for(connected).await.with_context(|| {
                format!("agent of {node}: no controller{}", tail_of(&log_of(&host)))
            })?;
        }
        Ok(())
    }

    /// What the `/metrics` of a node's agent say. The caller is in central's network namespace.
    pub async fn metrics(&self, node: &str) -> Result<String> {
        let text = http::get(&address_of(self.host(node)?)?, "/metrics").await;
        text.with_context(|| format!("/metrics of the agent of {node}"))
    }

    /// Whether it runs, and says that it is ready. The caller is in central's network namespace.
    pub async fn is_ready(host: &Host) -> bool {
        match address_of(host) {
            Ok(address) => http::is_ready(&address).await.unwrap_or(false),
            Err(_) => false,
        }
    }

    fn options(&self) -> BTreeMap<&'static str, String> {
        let socket = format!("qemu+unix:///system?socket={LAUNCHER}");
        let mut options = BTreeMap::from([
            // There is no name service here.
            ("--controller", self.controller.clone()),
            // The lab's libvirt is the node's own, and not one in each launcher.
            ("--libvirt-uri", socket),
        ]);
        if let Some(deadline) = self.hook.deadline {
            options.insert("--hook-deadline", deadline.as_secs_f64().to_string());
        }
        if self.hook.fails_on_timeout {
            options.insert("--hook-on-timeout", "fail".to_owned());
        }
        options
    }

    fn host(&self, node: &str) -> Result<&Host> {
        let mut nodes = self.nodes.iter();
        let found = nodes.find(|host| host.name() == node);
        found.with_context(|| format!("there is no node {node}"))
    }

    fn agent(&self, node: &str) -> Result<&Contained> {
        let agent = self.running.get(node);
        agent.with_context(|| format!("the agent of {node} does not run"))
    }

    /// Ends one, whatever was done to it.
    async fn end(&self, node: &str, agent: Contained) -> Result<()> {
        self.mend(node).await?;
        agent.signal(Signal::SIGCONT)?;
        agent.stop(GRACE).await
    }

    async fn ready(&mut self, host: &Host) -> Result<()> {
        let node = host.name();
        let deadline = Instant::now() + READY_DEADLINE;
        loop {
            let agent = self.running.get_mut(node);
            let agent = agent.with_context(|| format!("the agent of {node} does not run"))?;
            let ended = agent.ended()?;
            if let Some(how) = ended {
                self.running.remove(node);
                bail!(
                    "the agent of {node} ended with {how}{}",
                    tail_of(&log_of(host))
                );
            }
            if Self::is_ready(host).await {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the agent of {node} was not ready in time{}",
                tail_of(&log_of(host))
            );
            // It listens when it listens: nothing announces that to another process.
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn apply_plugin(&self) -> Result<()> {
        let mut hooks = self.plugin.spec.node_hooks.clone();
        if self.hook.refusal_counts {
            for hook in &mut hooks {
                hook.failure_strategy = Some("Fail".to_owned());
            }
        }
        let object = json!({
            "apiVersion": "plugin.kubevirt.io/v1alpha1",
            "kind": "Plugin",
            "metadata": {"name": self.plugin.name_any()},
            "spec": {"nodeHooks": hooks},
        });
        let plugins: Api<Plugin> = Api::all(self.client.clone());
        plugins
            .patch(
                PLUGIN,
                &PatchParams::apply(MANAGER).force(),
                &Patch::Apply(&object),
            )
            .await
            .context("apply the agents' Plugin")?;
        Ok(())
    }

    /// Without agents there is nobody to ask: virt-handler would wait two seconds for each migration to find that out.
    async fn remove_plugin(&self) -> Result<()> {
        let plugins: Api<Plugin> = Api::all(self.client.clone());
        match plugins.delete(PLUGIN, &DeleteParams::default()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => Err(error).context("delete the agents' Plugin"),
        }
    }
}

/// The value of the first sample of a metric that has no labels, or of these labels.
pub(crate) fn sample(metrics: &str, name: &str) -> Option<f64> {
    let mut lines = metrics.lines();
    lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Where a node's agent logs.
fn log_of(host: &Host) -> PathBuf {
    host.path("/var/log/node-hooks.log")
}

fn address_of(host: &Host) -> Result<String> {
    let address = host.management();
    let address = address.with_context(|| format!("{} has no address", host.name()))?;
    Ok(format!("{address}:{METRICS_PORT}"))
}

/// Puts libvirt's socket where a launcher's would be. Another name for it is the same socket.
fn show_libvirt(host: &Host) -> Result<()> {
    let (socket, shown) = (host.path(crate::lab::libvirt::SOCKET), host.path(LAUNCHER));
    if let Some(dir) = shown.parent() {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    match fs::remove_file(&shown) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| shown.display().to_string());
        }
        _ => {}
    }
    fs::hard_link(&socket, &shown).with_context(|| shown.display().to_string())
}

/// Looks until something holds that nothing announces, or an error persists.
async fn wait_for<F: Future<Output = Result<bool>>>(mut holds: impl FnMut() -> F) -> Result<()> {
    let mut last = None;
    let looking = async {
        loop {
            match holds().await {
                Ok(true) => return,
                Ok(false) => last = None,
                Err(error) => last = Some(error),
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    match (timeout(READY_DEADLINE, looking).await, last) {
        (Ok(()), _) => Ok(()),
        (Err(_), Some(error)) => Err(error),
        (Err(elapsed), None) => Err(elapsed.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::sample;

    #[test]
    fn a_sample_is_found_by_its_whole_name() {
        let metrics = "# TYPE a gauge\na_more 3\na 1\na{b=\"c\"} 2\n";
        assert_eq!(sample(metrics, "a"), Some(1.0));
        assert_eq!(sample(metrics, "a{b=\"c\"}"), Some(2.0));
        assert_eq!(sample(metrics, "b"), None);
    }
}
