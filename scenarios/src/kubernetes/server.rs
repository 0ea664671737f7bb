//! etcd and kube-apiserver.

use std::{
    ffi::OsString,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use kube::Client;
use tokio::{net::TcpSocket, time::sleep};

use super::{Assets, Error, Kubectl, Spawner, access, credentials::Credentials, process::Process};

/// On two busy cores the API is ready after some seconds; this is for hung ones.
const READY_DEADLINE: Duration = Duration::from_mins(2);
const READY_INTERVAL: Duration = Duration::from_millis(100);
const ETCD_SOCKET: &str = "etcd.sock";
/// For other members and for clients that look for members. There are none of either, and nothing listens there; but
/// etcd refuses the URL of a Unix socket as one to advertise.
const ADVERTISED: &str = "http://127.0.0.1:2379";
/// `sun_path` of unix(7), less the terminating zero.
const SOCKET_PATH_MAX: usize = 107;

/// Where a [`ControlPlane`] runs and keeps its files.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The programs.
    pub assets: Assets,
    /// Made anew: whatever is in it is removed first. It must be short, for etcd has Unix sockets in it.
    pub directory: PathBuf,
    /// Where clients find the API. A loopback address is the only one that is listened on; with any other address
    /// the server listens on all addresses of its network namespace.
    pub address: IpAddr,
    /// The port at that address.
    pub port: Port,
}

/// A TCP port for the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// This one.
    Fixed(u16),
    /// A free one of the network namespace of this process, held as long as the server runs: only for a server that
    /// runs in the same one.
    Free,
}

/// A running etcd and kube-apiserver, with their credentials.
///
/// Dropping it kills them; [`ControlPlane::stop`] stops them in order. They do not survive this process.
pub struct ControlPlane {
    settings: Settings,
    spawner: Spawner,
    credentials: Credentials,
    address: SocketAddr,
    client: Client,
    apiserver: Process,
    etcd: Process,
    /// Keeps [`Port::Free`] from being given to somebody else.
    _held: Option<TcpSocket>,
}

impl ControlPlane {
    /// Starts etcd and kube-apiserver with `spawner` and waits until the API is ready.
    ///
    /// # Errors
    /// When one of them cannot be started or ends ([`Error::Exited`] has the end of its log), or the API is not
    /// ready within two minutes. Nothing is left running.
    pub async fn start(settings: Settings, spawner: &Spawner) -> Result<Self, Error> {
        let directory = &settings.directory;
        if directory.exists() {
            fs::remove_dir_all(directory).map_err(Error::file(directory))?;
        }
        fs::create_dir_all(directory).map_err(Error::file(directory))?;
        let (held, port) = settings.port.hold(settings.address)?;
        let address = SocketAddr::new(settings.address, port);
        let credentials = Credentials::create(directory, settings.address)?;
        let kubeconfig = admin_kubeconfig(directory);
        access::write_admin(&kubeconfig, address, &credentials)?;
        let client = access::client(&kubeconfig).await?;

        let start = async |name: &'static str, arguments: Vec<OsString>| {
            let mut argv = vec![settings.assets.program(name).into_os_string()];
            argv.extend(arguments);
            Process::start(name, spawner(&argv), directory.join(format!("{name}.log"))).await
        };
        let etcd = start("etcd", etcd_arguments(directory)?).await?;
        let apiserver = start(
            "kube-apiserver",
            apiserver_arguments(&settings, address, &credentials),
        )
        .await?;
        let mut plane = Self {
            spawner: spawner.clone(),
            credentials,
            address,
            client,
            apiserver,
            etcd,
            _held: held,
            settings,
        };
        plane.ready().await?;
        Ok(plane)
    }

    /// A client with all rights.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The address that the API is reached at.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A kubeconfig with all rights, for people: `kubectl --kubeconfig FILE`.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        admin_kubeconfig(&self.settings.directory)
    }

    /// kubectl with all rights, run where the server runs.
    pub fn kubectl(&self) -> Kubectl {
        Kubectl::new(
            self.settings.assets.program("kubectl"),
            self.admin_kubeconfig(),
            self.spawner.clone(),
        )
    }

    /// Makes a token for a service account that exists, and writes a kubeconfig with that identity and no other.
    ///
    /// The token is valid for a day; what it allows follows from the RBAC rules alone.
    ///
    /// # Errors
    /// When the service account does not exist, or the file cannot be written.
    pub async fn kubeconfig_of_service_account(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<PathBuf, Error> {
        let token = access::service_account_token(self.client(), namespace, name).await?;
        let path = self
            .settings
            .directory
            .join(format!("{namespace}.{name}.kubeconfig"));
        access::write_token(&path, self.address, &self.credentials, name, token)?;
        Ok(path)
    }

    /// Stops kube-apiserver, then etcd. Both are tried; the first failure is reported.
    ///
    /// # Errors
    /// When a process can neither be asked to end nor be killed.
    pub async fn stop(self) -> Result<(), Error> {
        let apiserver = self.apiserver.stop().await;
        let etcd = self.etcd.stop().await;
        apiserver.and(etcd)
    }

    async fn ready(&mut self) -> Result<(), Error> {
        let started = Instant::now();
        loop {
            let client = self.client.clone();
            let probe = async {
                let request = http::Request::get("/readyz")
                    .body(Vec::new())
                    .map_err(kube::Error::HttpError)?;
                client.request_text(request).await
            };
            let answer = tokio::select! {
                answer = probe => answer,
                // The apiserver gives up without its etcd: etcd's end is the cause, so it is looked at first.
                error = self.etcd.died() => return Err(error),
                error = self.apiserver.died() => return Err(error),
            };
            let Err(error) = answer else { return Ok(()) };
            if self.etcd.exited().is_some() {
                return Err(self.etcd.died().await);
            }
            if self.apiserver.exited().is_some() {
                return Err(self.apiserver.died().await);
            }
            let waited = started.elapsed();
            if waited > READY_DEADLINE {
                let (log, tail) = (self.apiserver.log().into(), self.apiserver.log_tail());
                return Err(Error::NotReady {
                    waited,
                    last: error.to_string(),
                    log,
                    tail,
                });
            }
            sleep(READY_INTERVAL).await;
        }
    }
}

impl Port {
    /// With `SO_REUSEPORT` a socket that is bound and never listens keeps the port without getting connections
    /// (socket(7)), and kube-apiserver can bind it too when told to share.
    fn hold(self, address: IpAddr) -> Result<(Option<TcpSocket>, u16), Error> {
        if let Self::Fixed(port) = self {
            return Ok((None, port));
        }
        let held = || {
            let socket = if address.is_ipv4() {
                TcpSocket::new_v4()
            } else {
                TcpSocket::new_v6()
            }?;
            socket.set_reuseport(true)?;
            socket.bind(SocketAddr::new(bind_address(address), 0))?;
            let port = socket.local_addr()?.port();
            Ok((Some(socket), port))
        };
        held().map_err(Error::file(format!("a free port at {address}")))
    }
}

fn admin_kubeconfig(directory: &Path) -> PathBuf {
    directory.join("admin.kubeconfig")
}

fn bind_address(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) if !address.is_loopback() => [0, 0, 0, 0].into(),
        IpAddr::V6(address) if !address.is_loopback() => [0u16; 8].into(),
        loopback => loopback,
    }
}

/// Unix sockets: no port to clash over, and no network namespace to be in.
fn etcd_arguments(directory: &Path) -> Result<Vec<OsString>, Error> {
    let socket = |name: &str| {
        let path = directory.join(name);
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(Error::SocketPath {
                path,
                max: SOCKET_PATH_MAX,
            });
        }
        Ok(format!("unix://{}", path.display()))
    };
    let (clients, peers) = (socket(ETCD_SOCKET)?, socket("peer.sock")?);
    Ok([
        "--name=lab".to_owned(),
        format!("--data-dir={}", directory.join("etcd").display()),
        format!("--listen-client-urls={clients}"),
        format!("--advertise-client-urls={ADVERTISED}"),
        format!("--listen-peer-urls={peers}"),
        format!("--initial-advertise-peer-urls={ADVERTISED}"),
        format!("--initial-cluster=lab={ADVERTISED}"),
        // A crash of the machine may lose the lab's objects: the lab is gone then too.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ]
    .map(OsString::from)
    .into())
}

fn apiserver_arguments(
    settings: &Settings,
    address: SocketAddr,
    credentials: &Credentials,
) -> Vec<OsString> {
    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    [
        format!(
            "--etcd-servers=unix://{}",
            settings.directory.join(ETCD_SOCKET).display()
        ),
        format!("--bind-address={}", bind_address(address.ip())),
        format!("--advertise-address={}", address.ip()),
        format!("--secure-port={}", address.port()),
        file("tls-cert-file", &credentials.serving.certificate),
        file("tls-private-key-file", &credentials.serving.key),
        file("client-ca-file", &credentials.ca),
        file(
            "service-account-key-file",
            &credentials.service_accounts.certificate,
        ),
        file(
            "service-account-signing-key-file",
            &credentials.service_accounts.key,
        ),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        "--authorization-mode=RBAC".to_owned(),
        // Pods would be refused until a controller that does not run has made their service accounts.
        "--disable-admission-plugins=ServiceAccount".to_owned(),
        "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
        // No endpoints to reconcile where no Service is served.
        "--endpoint-reconciler-type=none".to_owned(),
        "--allow-privileged=true".to_owned(),
        "--profiling=false".to_owned(),
        // With a fixed port, two servers would share it unnoticed.
        format!("--permit-port-sharing={}", settings.port == Port::Free),
    ]
    .map(OsString::from)
    .into()
}
