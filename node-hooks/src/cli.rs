//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use arp_proxy::Pattern;
use clap::{Args, Parser, ValueEnum};
use rustls::pki_types::ServerName;

use crate::hook::{OnTimeout, Patience};
use crate::signals::PathPattern;
use crate::wire::Controller;

const EXAMPLES: &str = "\
Examples:
  node-hooks --node node1 --controller migration-controller-agents.segue-system.svc:9465
      As the DaemonSet in manifests/agent runs it: listen to every launcher's libvirt, open ports on br-int.
  node-hooks --node node1 --controller 10.0.0.1:9465 --libvirt-uri qemu:///system
      On a host with a libvirt daemon of its own.
  node-hooks … --hook-socket /var/run/kubevirt/plugins/segue.sock --hook-on-timeout fail
      Hold migrations until their network is ready, and refuse those for which nobody says so in time.

Runs as root in the host's network namespace. Needs CAP_NET_RAW for the frames on ports, CAP_DAC_OVERRIDE for sockets \
of libvirt and Open vSwitch that are other users', CAP_NET_ADMIN with --host-routes, and nothing else. Nothing is left \
behind but routes and proxy neighbours of guests that stay. SIGTERM or Ctrl-C ends it; twice, at once.

Without a controller it observes nothing and opens nothing; it goes on trying. Every option can be given in the \
environment as shown; several values are separated by commas. RUST_LOG=node_hooks=debug tells more.";

/// segue's agent on a node: hears the hypervisor, and opens a VM's port on the target at the moment the VM pauses on the
/// source.
///
/// It does what the segue controller tells it for handovers that are armed, and tells the controller what it sees of
/// them: the guest's pause and resume, its announcements, how its ports stand. Removing it costs a migration some
/// milliseconds, never its network: OVN opens the port itself when the guest announces itself.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub(crate) controller: ControllerArgs,
    #[command(flatten)]
    pub(crate) switch: SwitchArgs,
    #[command(flatten)]
    pub(crate) hypervisors: HypervisorArgs,
    #[command(flatten)]
    pub(crate) hook: HookArgs,
    #[command(flatten)]
    pub(crate) host: HostArgs,
    #[command(flatten)]
    pub(crate) service: ServiceArgs,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Controller")]
pub(crate) struct ControllerArgs {
    /// This node's name in Kubernetes; the certificate has to be this node's
    #[arg(long, value_name = "NAME", env = "SEGUE_NODE_NAME")]
    pub(crate) node: String,
    /// Where controllers listen for agents; the one that leads answers. A name may have several addresses, and the
    /// option may be given more than once
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "SEGUE_CONTROLLER",
        value_delimiter = ',',
        required = true
    )]
    pub(crate) controller: Vec<Controller>,
    /// Directory of tls.crt, tls.key (this node's) and ca.crt (whose word is taken for the controller's); files that
    /// change are read again
    #[arg(
        long,
        value_name = "DIRECTORY",
        env = "SEGUE_TLS_DIR",
        default_value = "/etc/segue/tls"
    )]
    pub(crate) tls_dir: PathBuf,
    /// What the controller's certificate has to name
    #[arg(long, value_name = "NAME", env = "SEGUE_CONTROLLER_NAME",
        default_value = "segue-migration-controller", value_parser = server_name)]
    pub(crate) controller_name: ServerName<'static>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Switch")]
pub(crate) struct SwitchArgs {
    /// Open vSwitch's database
    #[arg(
        long,
        value_name = "ENDPOINT",
        env = "SEGUE_OVS",
        default_value = "unix:/run/openvswitch/db.sock"
    )]
    pub(crate) ovs: String,
    /// The integration bridge
    #[arg(
        long,
        value_name = "NAME",
        env = "SEGUE_BRIDGE",
        default_value = "br-int"
    )]
    pub(crate) bridge: String,
    /// The bridge's management socket [default: /run/openvswitch/BRIDGE.mgmt]
    #[arg(long, value_name = "SOCKET", env = "SEGUE_BRIDGE_SOCKET")]
    bridge_socket: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Hypervisors")]
pub(crate) struct HypervisorArgs {
    /// Where launchers' libvirt daemons have their sockets; paths with wildcards. With the host's process namespace,
    /// /proc/[0-9]*/root/var/run/libvirt/virtqemud-sock does too. Empty for none
    #[arg(long, value_name = "PATTERN", env = "SEGUE_LIBVIRT_SOCKETS", value_delimiter = ',',
        default_value = "/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock",
        value_parser = path_pattern)]
    libvirt_sockets: Vec<Given<PathPattern>>,
    /// A libvirt daemon that is always there, such as qemu:///system
    #[arg(
        long,
        value_name = "URI",
        env = "SEGUE_LIBVIRT_URI",
        value_delimiter = ','
    )]
    pub(crate) libvirt_uri: Vec<String>,
    /// Ask libvirt for its own lifecycle events alone, on connections that may not write: a pause is then heard of when
    /// libvirt has written it to its disk, not as QEMU tells it
    #[arg(long, env = "SEGUE_LIBVIRT_READ_ONLY")]
    pub(crate) libvirt_read_only: bool,
    /// Where QEMUs without libvirt have monitor sockets that nobody else uses; paths with wildcards
    #[arg(long, value_name = "PATTERN", env = "SEGUE_QMP_SOCKETS", value_delimiter = ',', value_parser = path_pattern)]
    qmp_sockets: Vec<Given<PathPattern>>,
    /// The program that speaks to libvirt
    #[arg(
        long,
        value_name = "PROGRAM",
        env = "SEGUE_VIRSH",
        default_value = "virsh"
    )]
    pub(crate) virsh: PathBuf,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "KubeVirt's node hook")]
pub(crate) struct HookArgs {
    /// Answer virt-handler on this Unix socket; a Plugin object has to name it [default: nowhere]
    #[arg(long = "hook-socket", value_name = "SOCKET", env = "SEGUE_HOOK_SOCKET", value_parser = path)]
    socket: Option<Given<PathBuf>>,
    /// How long a migration waits for the controller's word; less than the Plugin's timeout
    #[arg(long = "hook-deadline", value_name = "SECONDS", env = "SEGUE_HOOK_DEADLINE", default_value = "20",
        value_parser = seconds)]
    deadline: Duration,
    /// What becomes of a migration for which the controller says nothing in that time
    #[arg(long = "hook-on-timeout", env = "SEGUE_HOOK_ON_TIMEOUT", value_enum, default_value_t = OnTimeout::Ignore)]
    on_timeout: OnTimeout,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Host")]
pub(crate) struct HostArgs {
    /// Be the guests' gateway (169.254.1.1, fe80::1) on the interfaces of these names, as arp-proxy is: where OVN
    /// cannot; may be shell patterns (tap*)
    #[arg(long, value_name = "PATTERN", env = "SEGUE_ARP_PROXY_INTERFACES", value_delimiter = ',', value_parser = pattern)]
    arp_proxy_interfaces: Vec<Given<Pattern>>,
    /// Make host routes and proxy neighbours for guests where the controller asks for them
    #[arg(long, env = "SEGUE_HOST_ROUTES")]
    pub(crate) host_routes: bool,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Service")]
pub(crate) struct ServiceArgs {
    /// Serve /metrics, /healthz and /readyz here
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "SEGUE_LISTEN",
        default_value = "0.0.0.0:9466"
    )]
    pub(crate) listen: SocketAddr,
    /// How log lines look
    #[arg(long, env = "SEGUE_LOG", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// A value, or none where the text was empty, as an unset variable of a manifest gives it.
#[derive(Clone, Debug)]
struct Given<T>(Option<T>);

impl SwitchArgs {
    pub(crate) fn bridge_socket(&self) -> PathBuf {
        let usual = || PathBuf::from(format!("/run/openvswitch/{}.mgmt", self.bridge));
        self.bridge_socket.clone().unwrap_or_else(usual)
    }
}

impl HypervisorArgs {
    pub(crate) fn libvirt_sockets(&self) -> Vec<PathPattern> {
        given(&self.libvirt_sockets)
    }

    pub(crate) fn qmp_sockets(&self) -> Vec<PathPattern> {
        given(&self.qmp_sockets)
    }
}

impl HookArgs {
    pub(crate) fn socket(&self) -> Option<&PathBuf> {
        self.socket.as_ref()?.0.as_ref()
    }

    pub(crate) fn patience(&self) -> Patience {
        Patience {
            deadline: self.deadline,
            on_timeout: self.on_timeout,
        }
    }
}

impl HostArgs {
    pub(crate) fn arp_proxy_interfaces(&self) -> Vec<Pattern> {
        given(&self.arp_proxy_interfaces)
    }
}

fn given<T: Clone>(values: &[Given<T>]) -> Vec<T> {
    let values = values.iter().filter_map(|given| given.0.as_ref());
    values.cloned().collect()
}

fn parse_given<T>(text: &str) -> Result<Given<T>, String>
where
    T: std::str::FromStr<Err: ToString>,
{
    if text.is_empty() {
        return Ok(Given(None));
    }
    let parsed = text.parse().map_err(|error: T::Err| error.to_string());
    parsed.map(|value| Given(Some(value)))
}

fn path(text: &str) -> Result<Given<PathBuf>, String> {
    parse_given(text)
}

fn path_pattern(text: &str) -> Result<Given<PathPattern>, String> {
    parse_given(text)
}

fn pattern(text: &str) -> Result<Given<Pattern>, String> {
    parse_given(text)
}

fn server_name(text: &str) -> Result<ServerName<'static>, String> {
    let name = ServerName::try_from(text.to_owned());
    name.map_err(|_| "expected a DNS name or an address".to_owned())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "expected a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    const LEAST: [&str; 4] = ["--node", "node1", "--controller", "segue-agents:9465"];

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["node-hooks"], args].concat())
    }

    fn with(args: &[&str]) -> Cli {
        parse(&[&LEAST, args].concat()).unwrap()
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn node_and_controller_are_enough() {
        let cli = with(&[]);
        assert_eq!(
            cli.switch.bridge_socket(),
            PathBuf::from("/run/openvswitch/br-int.mgmt")
        );
        assert_eq!(cli.hypervisors.libvirt_sockets().len(), 1);
        assert!(cli.hypervisors.qmp_sockets().is_empty());
        assert!(cli.hook.socket().is_none());
        assert_eq!(cli.hook.patience().deadline, Duration::from_secs(20));
        assert_eq!(cli.hook.patience().on_timeout, OnTimeout::Ignore);
        assert!(cli.host.arp_proxy_interfaces().is_empty());
        assert!(!cli.host.host_routes);
        assert_eq!(cli.service.listen.port(), 9466);
        for missing in [&LEAST[..2], &LEAST[2..]] {
            let error = parse(missing).unwrap_err().to_string();
            assert!(
                error.contains("--controller") || error.contains("--node"),
                "{error}"
            );
        }
    }

    #[test]
    fn everything_is_taken() {
        let cli = with(&[
            "--controller=10.0.0.1:9464,[fd00::1]:9465",
            "--tls-dir=/tls",
            "--controller-name=controller",
            "--bridge=br-x",
            "--libvirt-sockets=/proc/[0-9]*/root/var/run/libvirt/virtqemud-sock,/run/a*/sock",
            "--libvirt-uri=qemu:///system",
            "--qmp-sockets=/run/qemu/*.qmp",
            "--hook-socket=/run/hook.sock",
            "--hook-deadline=0.5",
            "--hook-on-timeout=fail",
            "--arp-proxy-interfaces=tap*,veth*",
            "--host-routes",
            "--log=json",
        ]);
        assert_eq!(cli.controller.controller.len(), 3);
        assert_eq!(
            cli.switch.bridge_socket(),
            PathBuf::from("/run/openvswitch/br-x.mgmt")
        );
        assert_eq!(cli.hypervisors.libvirt_sockets().len(), 2);
        assert_eq!(cli.hypervisors.qmp_sockets().len(), 1);
        assert_eq!(cli.hook.patience().deadline, Duration::from_millis(500));
        assert_eq!(cli.hook.patience().on_timeout, OnTimeout::Fail);
        assert_eq!(cli.host.arp_proxy_interfaces().len(), 2);
        assert!(cli.host.host_routes && cli.service.log == LogFormat::Json);
    }

    #[test]
    fn what_a_manifest_leaves_empty_is_none() {
        let cli = with(&[
            "--libvirt-sockets=",
            "--hook-socket=",
            "--arp-proxy-interfaces=",
        ]);
        assert!(cli.hypervisors.libvirt_sockets().is_empty());
        assert!(cli.hook.socket().is_none());
        assert!(cli.host.arp_proxy_interfaces().is_empty());
    }

    #[test]
    fn mistakes_are_named() {
        for (args, named) in [
            (["--controller", "nowhere"], "--controller"),
            (["--controller-name", "not a name"], "--controller-name"),
            (["--libvirt-sockets", "relative/*"], "--libvirt-sockets"),
            (["--hook-deadline", "soon"], "--hook-deadline"),
            (["--hook-on-timeout", "hang"], "--hook-on-timeout"),
            (["--arp-proxy-interfaces", "["], "--arp-proxy-interfaces"),
        ] {
            let error = parse(&[&LEAST[..], &args].concat())
                .unwrap_err()
                .to_string();
            assert!(error.contains(named), "{args:?}: {error}");
        }
    }
}
