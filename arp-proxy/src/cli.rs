//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::PathBuf;

use arp_proxy::{Config, Gateway, GatewayError, Limits, Mac, Pattern, Prefix, Router};
use clap::{Args, Parser, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  arp-proxy --interface 'tap*'
      Be the gateway of every virtual machine whose tap is on this host.
  arp-proxy --iface-id 'prod_*' --router-advertisements
      Likewise, of those that Open vSwitch has for these logical ports, and make it their IPv6 default router.
  arp-proxy --interface 'tap*' --control /run/arp-proxy.sock
  curl --unix-socket /run/arp-proxy.sock -X POST 'http://localhost/announce?interface=tap0'
      Tell the machine behind tap0 where its gateway is, as after it has come here from another host.

On a tap, what the machine sends comes in, and answers go to the machine alone. Interfaces are those of the network \
namespace that arp-proxy runs in; they may come and go. Needs CAP_NET_RAW. Nothing is made promiscuous, and nothing is \
left behind. Ctrl-C or SIGTERM ends it.

Every option can be given as ARP_PROXY_ and its name in the environment (ARP_PROXY_INTERFACE='tap*'); several values \
are separated by commas. RUST_LOG=arp_proxy=debug tells of each answer.";

/// Answers ARP requests and neighbour solicitations for a gateway that no host has.
///
/// A machine with an address and nothing else (a /32, a /128) has its gateway at 169.254.1.1 and fe80::1, the same
/// wherever it runs. On a link where nobody has these addresses, this says that they are at 0a:58:a9:fe:01:01. Made for
/// OVN before 23.06, whose own arp_proxy knows neither a MAC nor IPv6, and for ports that are not OVN's.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(flatten)]
    interfaces: Interfaces,
    #[command(flatten)]
    gateway: GatewayArgs,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    pub(crate) service: Service,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Interfaces (at least one of the first two)")]
struct Interfaces {
    /// Answer on the Ethernet interfaces of this name, present and future; may be a shell pattern (tap*), and given
    /// more than once
    #[arg(
        long,
        value_name = "PATTERN",
        env = "ARP_PROXY_INTERFACE",
        value_delimiter = ',',
        required_unless_present = "iface_id"
    )]
    interface: Vec<Pattern>,
    /// Answer on the interfaces that Open vSwitch has for this logical port (external_ids:iface-id); likewise
    #[arg(
        long,
        value_name = "PATTERN",
        env = "ARP_PROXY_IFACE_ID",
        value_delimiter = ','
    )]
    iface_id: Vec<Pattern>,
    /// Open vSwitch's database, asked only for --iface-id
    #[arg(
        long,
        value_name = "SOCKET",
        env = "ARP_PROXY_OVSDB",
        default_value = "/run/openvswitch/db.sock"
    )]
    ovsdb: PathBuf,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Gateway")]
struct GatewayArgs {
    /// Its addresses, IPv4 and IPv6
    #[arg(long, value_name = "ADDRESS", env = "ARP_PROXY_ADDRESS", value_delimiter = ',',
        default_values_t = [IpAddr::from(Gateway::DEFAULT_IPV4), IpAddr::from(Gateway::DEFAULT_IPV6)])]
    address: Vec<IpAddr>,
    /// Its Ethernet address
    #[arg(long, value_name = "MAC", env = "ARP_PROXY_MAC", default_value_t = Gateway::DEFAULT_MAC)]
    mac: Mac,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "IPv6 router")]
struct RouterArgs {
    /// Answer router solicitations too, and advertise the gateway as default router
    #[arg(long, env = "ARP_PROXY_ROUTER_ADVERTISEMENTS")]
    router_advertisements: bool,
    /// For how long an advertisement makes it a default router; it is repeated in time
    #[arg(long, value_name = "SECONDS", env = "ARP_PROXY_ROUTER_LIFETIME", default_value_t = 1800,
        value_parser = clap::value_parser!(u16).range(0..=9000), requires = "router_advertisements")]
    router_lifetime: u16,
    /// Let machines make addresses from this prefix (SLAAC); it is not on-link: everything is behind the gateway
    #[arg(
        long,
        value_name = "PREFIX/LENGTH",
        env = "ARP_PROXY_PREFIX",
        value_delimiter = ',',
        requires = "router_advertisements"
    )]
    prefix: Vec<Prefix>,
    /// Tell machines to ask DHCPv6 for addresses
    #[arg(long, env = "ARP_PROXY_MANAGED", requires = "router_advertisements")]
    managed: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits (of each interface on its own)")]
struct LimitArgs {
    /// Answers a second to one source MAC
    #[arg(long, value_name = "N", env = "ARP_PROXY_RATE", default_value_t = Limits::default().rate)]
    rate: NonZeroU32,
    /// Answers at once to a source MAC that has been silent
    #[arg(long, value_name = "N", env = "ARP_PROXY_BURST", default_value_t = Limits::default().burst)]
    burst: NonZeroU32,
    /// Source MACs that are told apart; those beyond share one account
    #[arg(long, value_name = "N", env = "ARP_PROXY_SOURCES", default_value_t = Limits::default().sources)]
    sources: usize,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Service")]
pub(crate) struct Service {
    /// Serve /metrics, /healthz and /readyz here [default: nowhere]
    #[arg(long, value_name = "ADDRESS:PORT", env = "ARP_PROXY_METRICS_ADDRESS")]
    pub(crate) metrics_address: Option<SocketAddr>,
    /// Serve the same and POST /announce?interface=NAME[&vlan=ID] on this Unix socket, for this user only [default:
    /// nowhere]
    #[arg(long, value_name = "SOCKET", env = "ARP_PROXY_CONTROL")]
    pub(crate) control: Option<PathBuf>,
    /// How log lines look
    #[arg(long, env = "ARP_PROXY_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Cli {
    pub(crate) fn config(&self) -> Result<Config, GatewayError> {
        let mut gateway = Gateway::new(self.gateway.mac, self.gateway.address.iter().copied())?;
        if self.router.router_advertisements {
            gateway = gateway.with_router(Router {
                lifetime: self.router.router_lifetime,
                managed: self.router.managed,
                prefixes: self.router.prefix.clone(),
            })?;
        }
        Ok(Config {
            gateway,
            interfaces: self.interfaces.interface.iter().cloned().collect(),
            iface_ids: self.interfaces.iface_id.iter().cloned().collect(),
            ovsdb: self.interfaces.ovsdb.clone(),
            limits: Limits {
                rate: self.limits.rate,
                burst: self.limits.burst,
                sources: self.limits.sources,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["arp-proxy"], args].concat())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_interface_is_enough() {
        let config = parse(&["--interface", "tap*"]).unwrap().config().unwrap();
        assert_eq!(config.gateway, Gateway::default());
        assert_eq!(config.limits, Limits::default());
        assert!(config.interfaces.include("tap0") && !config.interfaces.include("eth0"));
        assert!(config.iface_ids.is_empty());
    }

    #[test]
    fn no_interface_is_too_little() {
        let error = parse(&[]).unwrap_err().to_string();
        assert!(error.contains("--interface <PATTERN>"), "{error}");
        assert!(parse(&["--iface-id", "vm-*"]).is_ok());
    }

    #[test]
    fn everything_reaches_the_configuration() {
        let config = parse(&[
            "--interface=tap*,veth*",
            "--iface-id=vm-*",
            "--ovsdb=/run/db.sock",
            "--address=10.0.0.1,fe80::2",
            "--mac=02:00:00:00:00:01",
            "--router-advertisements",
            "--router-lifetime=900",
            "--prefix=2001:db8::/64",
            "--managed",
            "--rate=1",
            "--burst=2",
            "--sources=3",
        ])
        .unwrap()
        .config()
        .unwrap();
        let gateway = Gateway::new(
            "02:00:00:00:00:01".parse().unwrap(),
            ["10.0.0.1".parse().unwrap(), "fe80::2".parse().unwrap()],
        )
        .unwrap();
        let router = Router {
            lifetime: 900,
            managed: true,
            prefixes: vec!["2001:db8::/64".parse().unwrap()],
        };
        assert_eq!(config.gateway, gateway.with_router(router).unwrap());
        assert!(config.interfaces.include("veth0") && config.iface_ids.include("vm-1"));
        assert_eq!(config.ovsdb, PathBuf::from("/run/db.sock"));
        let Limits {
            rate,
            burst,
            sources,
        } = config.limits;
        assert_eq!((rate.get(), burst.get(), sources), (1, 2, 3));
    }

    #[test]
    fn mistakes_are_named() {
        for (args, named) in [
            (&["--interface", "["][..], "--interface"),
            (&["--interface", "a", "--mac", "5"], "--mac"),
            (&["--interface", "a", "--address", "gw"], "--address"),
            (
                &["--interface", "a", "--prefix", "2001:db8::/64"],
                "--router-advertisements",
            ),
            (
                &[
                    "--interface",
                    "a",
                    "--router-advertisements",
                    "--prefix",
                    "x",
                ],
                "--prefix",
            ),
            (&["--interface", "a", "--rate", "0"], "--rate"),
        ] {
            let error = parse(args).unwrap_err().to_string();
            assert!(error.contains(named), "{args:?}: {error}");
        }
        let multicast = parse(&["--interface", "a", "--address", "ff02::1"]).unwrap();
        let error = multicast.config().unwrap_err().to_string();
        assert!(error.contains("ff02::1"), "{error}");
    }
}
