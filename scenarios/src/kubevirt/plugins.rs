//! Plugins with hooks on nodes, as virt-handler calls them (KubeVirt 1.9, feature gate `Plugins`).
//!
//! Followed are `pkg/virt-handler/plugins/manager.go`, `pkg/hooks/plugins/v1alpha1/client.go` and
//! `pkg/util/net/grpc/grpc.go`: all plugins in the order of their names and their hooks in that of the object, one after
//! the other, each over a connection of its own; a hook's own failure strategy decides, the plugin's is for other hooks.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use kube::api::ListParams;
use kube::{Api, CustomResource, ResourceExt as _};
use node_hooks_api::kubevirt::node_hook_service_client::NodeHookServiceClient;
use node_hooks_api::kubevirt::{ExecuteNodeHookRequest, NodeContext};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint, Uri};

use super::{
    BoxError, Error, Hypervisor, Unknown, VirtualMachineInstance,
    context::{Context, namespace},
};

/// How long a plugin may take where its hook does not say (`DefaultTimeout`).
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection may take to come about (`CONNECT_TIMEOUT_SECONDS`): until then gRPC for Go tries again.
const DIAL_DEADLINE: Duration = Duration::from_secs(2);
/// The pause of gRPC for Go before the second attempt (`backoff.DefaultConfig`).
const REDIAL_INTERVAL: Duration = Duration::from_secs(1);

/// What a plugin is to be.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[kube(
    group = "plugin.kubevirt.io",
    version = "v1alpha1",
    kind = "Plugin",
    derive = "PartialEq",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct PluginSpec {
    /// To which VMIs it applies, in CEL, which nobody evaluates here.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub condition: String,
    /// Its hooks on nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_hooks: Vec<NodeHook>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Unknown,
}

/// A hook on a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeHook {
    /// The Unix socket on each node.
    pub socket: PathBuf,
    /// When it is called.
    pub permitted_hooks: Vec<String>,
    /// To which VMIs it applies, in CEL, which nobody evaluates here.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub condition: String,
    /// `Ignore`, or anything else for `Fail`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_strategy: Option<String>,
    /// How long it may take, as Go writes durations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
}

/// A moment in a VM's life at which hooks are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPoint {
    /// On the source, right before the copy starts.
    PreMigrationSource,
}

/// What becomes of a call of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookResult {
    /// It has begun.
    Asked,
    /// The plugin agrees.
    Agreed,
    /// It failed, and the hook's strategy is to go on.
    Ignored(String),
    /// It failed, and the step that is hooked with it.
    Failed(String),
}

/// Something that happened to a call of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookCall {
    /// The node.
    pub node: String,
    /// `<namespace>/<name>` of the VMI.
    pub vmi: String,
    /// The plugin.
    pub plugin: String,
    /// When.
    pub point: HookPoint,
    /// When it happened.
    pub at: SystemTime,
    /// What.
    pub result: HookResult,
}

impl HookPoint {
    /// As `permittedHooks` name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PreMigrationSource => "PreMigrationSource",
        }
    }
}

impl NodeHook {
    fn is_permitted(&self, point: HookPoint) -> bool {
        self.permitted_hooks
            .iter()
            .any(|hook| hook == point.as_str())
    }

    fn is_ignored(&self) -> bool {
        self.failure_strategy.as_deref() == Some("Ignore")
    }

    fn patience(&self) -> Result<Duration, BoxError> {
        let Some(text) = &self.timeout else {
            return Ok(DEFAULT_TIMEOUT);
        };
        let timeout = go_duration(text);
        let timeout = timeout.ok_or_else(|| format!("timeout {text:?} is no duration of Go's"))?;
        // As the client has it.
        Ok(if timeout.is_zero() {
            DEFAULT_TIMEOUT
        } else {
            timeout
        })
    }
}

impl<H: Hypervisor> Context<H> {
    /// Calls every plugin's hooks of this kind, and returns once all have answered.
    ///
    /// # Errors
    /// When one fails whose strategy is not to ignore that. Those after it are not called.
    pub(super) async fn call_node_hooks(
        &self,
        point: HookPoint,
        vmi: &VirtualMachineInstance,
        node: &str,
    ) -> Result<(), Error> {
        for (plugin, hook) in self.node_hooks(point).await? {
            let tell = |result| {
                self.launchers.tell_hook_call(HookCall {
                    node: node.to_owned(),
                    vmi: format!("{}/{}", namespace(vmi), vmi.name_any()),
                    plugin: plugin.clone(),
                    point,
                    at: SystemTime::now(),
                    result,
                });
            };
            tell(HookResult::Asked);
            let socket = self.launchers.hypervisor().on_node(node, &hook.socket);
            let Err(why) = execute(&socket, &hook, point, vmi, node).await else {
                tell(HookResult::Agreed);
                continue;
            };
            let doing = format!("node hook {} of plugin {plugin}", point.as_str());
            if !hook.is_ignored() {
                tell(HookResult::Failed(why.to_string()));
                return Err(Error::Plugin { doing, source: why });
            }
            tracing::warn!(vmi = vmi.name_any(), why, "{doing} failed (ignored)");
            tell(HookResult::Ignored(why.to_string()));
        }
        Ok(())
    }

    /// The hooks to call, with the names of their plugins. None where there is no such API, as without the feature gate.
    async fn node_hooks(&self, point: HookPoint) -> Result<Vec<(String, NodeHook)>, Error> {
        let plugins: Api<Plugin> = Api::all(self.client.clone());
        let mut plugins = match plugins.list(&ListParams::default()).await {
            Ok(listed) => listed.items,
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(Vec::new()),
            Err(error) => return Err(Error::api("listing plugins")(error)),
        };
        plugins.sort_by_key(kube::ResourceExt::name_any);
        let mut hooks = Vec::new();
        for plugin in plugins {
            let name = plugin.name_any();
            let of_plugin = plugin.spec.condition;
            for hook in plugin.spec.node_hooks {
                if !hook.is_permitted(point) {
                    continue;
                }
                if !of_plugin.is_empty() || !hook.condition.is_empty() {
                    return Err(Error::Plugin {
                        doing: format!("plugin {name}"),
                        source: "it has a condition, and the stand-in evaluates no CEL".into(),
                    });
                }
                hooks.push((name.clone(), hook));
            }
        }
        Ok(hooks)
    }
}

async fn execute(
    socket: &Path,
    hook: &NodeHook,
    point: HookPoint,
    vmi: &VirtualMachineInstance,
    node: &str,
) -> Result<(), BoxError> {
    let patience = hook.patience()?;
    let channel = dial(socket).await?;
    let mut request = tonic::Request::new(ExecuteNodeHookRequest {
        hook_point: point.as_str().to_owned(),
        vmi: serde_json::to_vec(vmi)?,
        node_context: Some(NodeContext {
            node_name: node.to_owned(),
        }),
    });
    request.set_timeout(patience);
    let answer = NodeHookServiceClient::new(channel)
        .execute_node_hook(request)
        .await;
    match answer {
        Ok(_) => Ok(()),
        Err(status) => Err(format!("{:?}: {}", status.code(), status.message()).into()),
    }
}

/// A connection to a plugin that has begun to speak.
async fn dial(socket: &Path) -> Result<Channel, BoxError> {
    let mut last = None;
    let dialling = async {
        loop {
            match attempt(socket).await {
                Ok(channel) => return channel,
                Err(error) => last = Some(error),
            }
            sleep(REDIAL_INTERVAL).await;
        }
    };
    let dialled = timeout(DIAL_DEADLINE, dialling).await;
    dialled.map_err(|_| {
        let why = last.map_or_else(|| "it says nothing".into(), |error| error.to_string());
        format!("cannot dial {}: {why}", socket.display()).into()
    })
}

async fn attempt(socket: &Path) -> Result<Channel, BoxError> {
    let stream = UnixStream::connect(socket).await?;
    // A server speaks first (RFC 9113, section 3.4), and gRPC for Go has no connection before that. A process that stands
    // still takes connections all the same: the kernel does it.
    stream.readable().await?;
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = stream.take().ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::NotConnected, "the plugin hung up")
        });
        async move { stream }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    Ok(endpoint.connect_with_connector(connector).await?)
}

/// A duration as Go's `time.ParseDuration` reads it: `1m30s`, `2.5s`, `300ms`.
fn go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(digits);
        let unit_end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, next) = after.split_at(unit_end);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3_600.0,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        let part = Duration::try_from_secs_f64(number * seconds).ok()?;
        total = total.checked_add(part)?;
        rest = next;
    }
    // Go counts nanoseconds in 64 bits.
    let is_known = !text.is_empty() && i64::try_from(total.as_nanos()).is_ok();
    is_known.then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let seconds = |text: &str| go_duration(text).map(|it| it.as_secs_f64());
        assert_eq!(seconds("30s"), Some(30.0));
        assert_eq!(seconds("1m30s"), Some(90.0));
        assert_eq!(seconds("1h0m0.5s"), Some(3_600.5));
        assert_eq!(seconds("300ms"), Some(0.3));
        assert_eq!(seconds("0"), Some(0.0));
        for nonsense in [
            "",
            "30",
            "s",
            "30 s",
            "-1s",
            "1d",
            "1.2.3s",
            "99999999999999h",
        ] {
            assert_eq!(seconds(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn a_hook_without_words_waits_for_thirty_seconds_and_fails() {
        let hook = NodeHook::default();
        assert_eq!(hook.patience().unwrap(), DEFAULT_TIMEOUT);
        assert!(!hook.is_ignored() && !hook.is_permitted(HookPoint::PreMigrationSource));
        let hook = NodeHook {
            permitted_hooks: vec!["PreVMStart".into(), "PreMigrationSource".into()],
            failure_strategy: Some("Ignore".into()),
            timeout: Some("25s".into()),
            ..NodeHook::default()
        };
        assert_eq!(hook.patience().unwrap(), Duration::from_secs(25));
        assert!(hook.is_ignored() && hook.is_permitted(HookPoint::PreMigrationSource));
    }
}
