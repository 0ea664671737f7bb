//! The real thing: TCP, TLS and certificates that change.

use std::net::SocketAddr;
use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::super::{Certificates, Endpoint, listen};
use super::authority::{Authority, Issued};
use super::*;

const CONTROLLER: &str = "segue-migration-controller";

async fn serve(dir: &Path) -> (SocketAddr, Lab) {
    let lab = Lab::new();
    let certificates = Certificates::new(dir.to_owned());
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::bind(any, certificates).await.unwrap();
    let address = endpoint.address().unwrap();
    let metrics = lab.metrics.clone();
    let stop = lab.stop.clone();
    tokio::spawn(listen(endpoint, lab.hub.clone(), metrics, stop));
    (address, lab)
}

/// An agent's connection, with this certificate or none, that trusts who signed the controller's.
async fn connect(
    address: SocketAddr,
    trusted: &Authority,
    own: Option<Issued>,
) -> Result<Channel, tonic::transport::Error> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(trusted.pem().as_bytes()).unwrap();
    roots.add(root).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match own {
        Some(own) => {
            let chain = CertificateDer::from_pem_slice(own.certificate.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap();
            config.with_client_auth_cert(vec![chain], key).unwrap()
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let connector = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from(CONTROLLER).unwrap();
            let stream = connector.connect(name, stream).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://controller");
    endpoint.connect_with_connector(connector).await
}

#[tokio::test]
async fn a_node_is_let_in_by_its_certificate_and_by_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(dir.path(), &[CONTROLLER]);
    let (address, lab) = serve(dir.path()).await;
    let own = authority.issue(&["n1.node.segue.io"]);
    let channel = connect(address, &authority, Some(own)).await.unwrap();
    let mut agent = attach(channel.clone(), hello("n1")).await.unwrap();
    assert!(matches!(agent.next().await, Message::Welcome(_)));
    let status = attach(channel, hello("n2")).await.err().unwrap();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);

    let strangers = [
        None,
        Some(Authority::new().issue(&["n1.node.segue.io"])),
        Some(authority.issue(&[CONTROLLER])),
        Some(authority.issue(&["*.node.segue.io"])),
    ];
    for stranger in strangers {
        // In TLS 1.3 a client hears of its refusal when it first reads.
        if let Ok(channel) = connect(address, &authority, stranger).await {
            attach(channel, hello("n1")).await.err().expect("refused");
        }
    }
    lab.metric("segue_agent_streams_refused_total{reason=\"NoNode\"} 2")
        .await;
    lab.metric("segue_agent_streams_refused_total{reason=\"Handshake\"} 2")
        .await;
    assert!(
        agent.all_said().await.is_empty(),
        "and nobody took its place"
    );
}

#[tokio::test]
async fn certificates_that_come_or_change_count_from_the_next_connection_on() {
    let dir = tempfile::tempdir().unwrap();
    let (address, lab) = serve(dir.path()).await;
    let first = Authority::new();
    let node = |authority: &Authority| Some(authority.issue(&["n1.node.segue.io"]));
    assert!(connect(address, &first, node(&first)).await.is_err());
    lab.metric("segue_agent_streams_refused_total{reason=\"NoCertificate\"} 1")
        .await;
    first.write(dir.path(), &[CONTROLLER]);
    let channel = connect(address, &first, node(&first)).await.unwrap();
    let mut agent = attach(channel, hello("n1")).await.unwrap();
    assert!(matches!(agent.next().await, Message::Welcome(_)));

    let second = Authority::new();
    second.write(dir.path(), &[CONTROLLER]);
    assert!(connect(address, &first, node(&first)).await.is_err());
    let channel = connect(address, &second, node(&second)).await.unwrap();
    let mut newer = attach(channel, hello("n1")).await.unwrap();
    assert!(matches!(newer.next().await, Message::Welcome(_)));
    assert_eq!(agent.end().await.code(), tonic::Code::Aborted);
}

#[tokio::test]
async fn agents_are_served_while_a_strangers_connection_has_the_certificates_read() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(dir.path(), &[CONTROLLER]);
    let (address, _lab) = serve(dir.path()).await;
    let own = authority.issue(&["n1.node.segue.io"]);
    let channel = connect(address, &authority, Some(own)).await.unwrap();
    let mut agent = attach(channel, hello("n1")).await.unwrap();

    // Who reads a pipe waits for who writes.
    let slow = dir.path().join("tls.crt");
    std::fs::remove_file(&slow).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&slow).status();
    assert!(made.unwrap().success());
    let _stranger = TcpStream::connect(address).await.unwrap();
    let opening = move || std::fs::File::options().write(true).open(slow);
    let read = tokio::task::spawn_blocking(opening).await.unwrap().unwrap();
    assert!(matches!(
        agent.all_said().await.as_slice(),
        [Message::Welcome(_)]
    ));
    drop(read);
}
