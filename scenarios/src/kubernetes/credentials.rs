//! The certificates and keys of one server, made anew for it.

use std::{
    fs::OpenOptions,
    io::Write as _,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

use super::Error;

/// The files that kube-apiserver and the people who use it need.
#[derive(Debug)]
pub(super) struct Credentials {
    /// Signed the two certificates; its key is thrown away.
    pub(super) ca: PathBuf,
    /// kube-apiserver's serving certificate.
    pub(super) serving: Pair,
    /// A client certificate of the group `system:masters`.
    pub(super) admin: Pair,
    /// Signs the tokens of service accounts; a bare public key for a certificate.
    pub(super) service_accounts: Pair,
}

/// A certificate and its key.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

impl Credentials {
    /// Writes new credentials for a server at `address` into `directory`.
    pub(super) fn create(directory: &Path, address: IpAddr) -> Result<Self, Error> {
        let (ca, issuer) = authority()?;
        let ca_file = directory.join("ca.crt");
        write_private(&ca_file, &ca)?;

        let mut names = CertificateParams::new(
            [
                "localhost",
                "kubernetes",
                "kubernetes.default",
                "kubernetes.default.svc",
            ]
            .map(String::from),
        )?;
        for address in [address, [127, 0, 0, 1].into()] {
            names.subject_alt_names.push(SanType::IpAddress(address));
        }
        names.distinguished_name = subject("kube-apiserver", None);
        names
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ServerAuth);

        let mut admin = CertificateParams::default();
        admin.distinguished_name = subject("lab-admin", Some("system:masters"));
        admin
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ClientAuth);

        let key = KeyPair::generate()?;
        Ok(Self {
            ca: ca_file,
            serving: Pair::create(directory, "kube-apiserver", names, &issuer)?,
            admin: Pair::create(directory, "admin", admin, &issuer)?,
            service_accounts: Pair::write(
                directory,
                "service-accounts",
                &key.public_key_pem(),
                &key,
            )?,
        })
    }
}

impl Pair {
    fn create(
        directory: &Path,
        name: &str,
        mut params: CertificateParams,
        issuer: &Issuer<'_, KeyPair>,
    ) -> Result<Self, Error> {
        params.key_usages.push(KeyUsagePurpose::DigitalSignature);
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        Self::write(
            directory,
            name,
            &params.signed_by(&key, issuer)?.pem(),
            &key,
        )
    }

    fn write(
        directory: &Path,
        name: &str,
        certificate: &str,
        key: &KeyPair,
    ) -> Result<Self, Error> {
        let pair = Self {
            certificate: directory.join(format!("{name}.crt")),
            key: directory.join(format!("{name}.key")),
        };
        write_private(&pair.certificate, certificate)?;
        write_private(&pair.key, &key.serialize_pem())?;
        Ok(pair)
    }
}

fn authority() -> Result<(String, Issuer<'static, KeyPair>), Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = subject("lab-ca", None);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), Issuer::new(params, key)))
}

/// Kubernetes reads the user from the common name and its groups from the organisations.
fn subject(user: &str, group: Option<&str>) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, user);
    if let Some(group) = group {
        subject.push(DnType::OrganizationName, group);
    }
    subject
}

/// Writes a file that nobody but its owner can read.
pub(super) fn write_private(path: &Path, content: &str) -> Result<(), Error> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(Error::file(path))
}
