//! Who may speak to whom: certificates of the controller and of the nodes.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ServerConfig, WebPkiClientVerifier};
use thiserror::Error;

/// What a node's certificate calls it: a DNS name of `<node>` and this.
const NODE_SUFFIX: &str = ".node.segue.io";
/// In the directory, as a Secret of type `kubernetes.io/tls` has them.
const FILES: [&str; 3] = ["tls.crt", "tls.key", "ca.crt"];

/// Why there is no TLS.
#[derive(Debug, Error)]
pub(crate) enum TlsError {
    /// A file cannot be read.
    #[error("{path} cannot be read: put tls.crt, tls.key and ca.crt there")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no usable {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        what: &'static str,
    },
    /// They do not fit each other, or nothing can be done with them.
    #[error("the certificate and the key in {dir} cannot be used")]
    Rustls {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// No agent could ever be let in.
    #[error("the certificates in {dir}/ca.crt cannot verify anybody")]
    Verifier {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: rustls::server::VerifierBuilderError,
    },
}

/// The controller's certificate and key, and who signs the nodes', in a directory. They are read
/// anew for every connection, so that a change counts from the next one on.
pub(crate) struct Certificates {
    dir: PathBuf,
    last: Mutex<Option<Last>>,
}

struct Last {
    files: [Vec<u8>; 3],
    config: Arc<ServerConfig>,
}

impl Certificates {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            last: Mutex::default(),
        }
    }

    /// What to shake hands with now. It reads files, so it takes as long as those take.
    ///
    /// # Errors
    ///
    /// Those of the files, where none of them could ever be used. Once they could, files that cannot
    /// (a change that was caught half-way) leave what was there before in use.
    pub(crate) fn config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.read().and_then(|files| {
            if let Some(last) = last.as_ref().filter(|last| last.files == files) {
                return Ok((files, last.config.clone()));
            }
            let config = Arc::new(self.build(&files)?);
            tracing::info!(dir = %self.dir.display(), "certificates read");
            Ok((files, config))
        });
        match (found, last.as_ref()) {
            (Ok((files, config)), _) => {
                let current = config.clone();
                *last = Some(Last { files, config });
                Ok(current)
            }
            (Err(error), Some(last)) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the certificates from before stay in use");
                Ok(last.config.clone())
            }
            (Err(error), None) => Err(error),
        }
    }

    fn read(&self) -> Result<[Vec<u8>; 3], TlsError> {
        let read = |name: &str| {
            let path = self.dir.join(name);
            std::fs::read(&path).map_err(|source| TlsError::Read { path, source })
        };
        let [certificate, key, authority] = FILES;
        Ok([read(certificate)?, read(key)?, read(authority)?])
    }

    fn build(
        &self,
        [certificate, key, authority]: &[Vec<u8>; 3],
    ) -> Result<ServerConfig, TlsError> {
        let content = |name: &str, what| TlsError::Content {
            path: self.dir.join(name),
            what,
        };
        let chain = certificates(certificate).ok_or_else(|| content(FILES[0], "certificate"))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| content(FILES[1], "key"))?;
        let authority = certificates(authority).ok_or_else(|| content(FILES[2], "certificate"))?;
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(authority);
        if added == 0 {
            return Err(content(FILES[2], "certificate"));
        }
        let rustls = |source| TlsError::Rustls {
            dir: self.dir.clone(),
            source,
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
            .build()
            .map_err(|source| TlsError::Verifier {
                dir: self.dir.clone(),
                source,
            })?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(rustls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(rustls)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// The certificates of a PEM file; nothing where one is damaged or there is none.
fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    found.ok().filter(|found| !found.is_empty())
}

/// The node that a certificate is of. One that names several nodes, or any node, is of none.
pub(super) fn node_of(certificate: &CertificateDer<'_>) -> Option<String> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    let mut nodes = certificate
        .valid_dns_names()
        .filter_map(|name| name.strip_suffix(NODE_SUFFIX))
        .map(str::to_owned);
    let node = nodes.next()?;
    let only = nodes.all(|other| other == node);
    (only && !node.is_empty() && !node.contains('*')).then_some(node)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::authority::Authority;
    use super::*;

    #[test]
    fn a_certificate_is_of_the_one_node_that_it_names() {
        let authority = Authority::new();
        let node = |names: &[&str]| {
            let issued = authority.issue(names);
            node_of(&CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap())
        };
        assert_eq!(node(&["n1.node.segue.io"]).as_deref(), Some("n1"));
        let with_dots = node(&["n1.example.node.segue.io", "n1"]);
        assert_eq!(with_dots.as_deref(), Some("n1.example"));
        for names in [
            &["n1.node.segue.io", "n2.node.segue.io"][..],
            &["*.node.segue.io"],
            &["n1"],
            &["segue-migration-controller"],
        ] {
            assert_eq!(node(names), None, "{names:?}");
        }
    }

    #[test]
    fn what_changes_counts_and_what_is_damaged_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let certificates = Certificates::new(dir.path().to_owned());
        let error = certificates.config().unwrap_err().to_string();
        assert!(error.contains("tls.crt"), "{error}");
        let authority = Authority::new();
        authority.write(dir.path(), &["segue-migration-controller"]);
        let first = certificates.config().unwrap();
        assert!(Arc::ptr_eq(&first, &certificates.config().unwrap()));
        fs::write(dir.path().join("tls.key"), "half a key").unwrap();
        assert!(Arc::ptr_eq(&first, &certificates.config().unwrap()));
        authority.write(dir.path(), &["segue-migration-controller"]);
        let renewed = certificates.config().unwrap();
        assert!(!Arc::ptr_eq(&first, &renewed));
        // A key that is not the certificate's.
        let other = Authority::new().issue(&["segue-migration-controller"]);
        fs::write(dir.path().join("tls.key"), other.key).unwrap();
        assert!(Arc::ptr_eq(&renewed, &certificates.config().unwrap()));
    }
}
