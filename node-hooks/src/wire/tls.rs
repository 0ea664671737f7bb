//! The agent's certificate and the authority that vouches for the controller's, from files that
//! others replace.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;

/// The certificate's chain, the node's first.
pub(super) const CERTIFICATE: &str = "tls.crt";
/// Its key.
pub(super) const KEY: &str = "tls.key";
/// The authorities that vouch for the controller.
pub(super) const AUTHORITIES: &str = "ca.crt";

/// What is wrong with the files.
#[derive(Debug, Error)]
pub enum TlsError {
    /// One cannot be read.
    #[error("cannot read {path}: does the node have its tls.crt, tls.key and ca.crt there?")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// One is not what it should be.
    #[error("{path} holds no usable PEM: {reason}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// They do not go together.
    #[error("{directory}: the certificate and its key cannot be used")]
    Unusable {
        /// Where they are.
        directory: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
}

/// The three files, read anew for every connection.
#[derive(Debug)]
pub(super) struct Credentials {
    directory: PathBuf,
    loaded: Option<(Contents, Arc<ClientConfig>)>,
}

/// The files as they are. Compared as a whole: Kubernetes changes a Secret by swapping a symbolic
/// link that leads to all of them, so neither names nor times of change tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    authorities: Vec<u8>,
}

impl Credentials {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            loaded: None,
        }
    }

    /// What to connect with, from the files as they are now.
    pub(super) async fn load(&mut self) -> Result<Arc<ClientConfig>, TlsError> {
        let contents = Contents::read(&self.directory).await?;
        if let Some((known, config)) = &self.loaded
            && *known == contents
        {
            return Ok(config.clone());
        }
        let config = Arc::new(contents.config(&self.directory)?);
        self.loaded = Some((contents, config.clone()));
        Ok(config)
    }

    /// Whether the files have become others than those that were loaded, and can be used.
    pub(super) async fn are_renewed(&self) -> Result<bool, TlsError> {
        let contents = Contents::read(&self.directory).await?;
        if self
            .loaded
            .as_ref()
            .is_some_and(|(known, _)| *known == contents)
        {
            return Ok(false);
        }
        contents.config(&self.directory).map(|_| true)
    }
}

impl Contents {
    async fn read(directory: &Path) -> Result<Self, TlsError> {
        let read = async |name: &str| {
            let path = directory.join(name);
            let read = tokio::fs::read(&path).await;
            read.map_err(|source| TlsError::Read { path, source })
        };
        Ok(Self {
            certificate: read(CERTIFICATE).await?,
            key: read(KEY).await?,
            authorities: read(AUTHORITIES).await?,
        })
    }

    fn config(&self, directory: &Path) -> Result<ClientConfig, TlsError> {
        let unusable = |source| TlsError::Unusable {
            directory: directory.to_owned(),
            source,
        };
        let wrong = |name: &str, reason: String| TlsError::Pem {
            path: directory.join(name),
            reason,
        };
        let chain = certificates(&self.certificate).map_err(|why| wrong(CERTIFICATE, why))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| wrong(KEY, error.to_string()))?;
        let mut roots = RootCertStore::empty();
        for authority in certificates(&self.authorities).map_err(|why| wrong(AUTHORITIES, why))? {
            let added = roots.add(authority);
            added.map_err(|error| wrong(AUTHORITIES, error.to_string()))?;
        }
        let provider = Arc::new(ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(unusable)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A session that is resumed would keep an identity that has since expired.
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err("there is no certificate".to_owned()),
        Ok(found) => Ok(found),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_pki::Pki;
    use super::*;

    #[tokio::test]
    async fn what_has_not_changed_is_not_made_anew() {
        let pki = Pki::new();
        let directory = pki.agent("node1");
        let mut credentials = Credentials::new(directory.path().to_owned());
        let first = credentials.load().await.unwrap();
        let second = credentials.load().await.unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert!(!credentials.are_renewed().await.unwrap());
        pki.renew(&directory, "node1");
        assert!(credentials.are_renewed().await.unwrap());
        let third = credentials.load().await.unwrap();
        assert!(!Arc::ptr_eq(&first, &third));
        assert!(!credentials.are_renewed().await.unwrap());
    }

    #[tokio::test]
    async fn half_of_a_renewal_is_no_renewal() {
        let pki = Pki::new();
        let (directory, other) = (pki.agent("node1"), pki.agent("node1"));
        let mut credentials = Credentials::new(directory.path().to_owned());
        credentials.load().await.unwrap();
        std::fs::copy(other.path().join(KEY), directory.path().join(KEY)).unwrap();
        let error = credentials.are_renewed().await.unwrap_err();
        assert!(matches!(error, TlsError::Unusable { .. }), "{error}");
    }

    #[tokio::test]
    async fn what_is_missing_or_nonsense_is_named() {
        let pki = Pki::new();
        for name in [CERTIFICATE, KEY, AUTHORITIES] {
            let directory = pki.agent("node1");
            let mut credentials = Credentials::new(directory.path().to_owned());
            std::fs::write(directory.path().join(name), "nonsense").unwrap();
            let error = credentials.load().await.unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            std::fs::remove_file(directory.path().join(name)).unwrap();
            let error = credentials.load().await.unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
