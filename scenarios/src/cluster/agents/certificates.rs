//! Who the controller and the agents are to each other: an authority of the lab's own, and what it issues.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair,
};

use crate::lab::Lab;

/// What the controllers' certificate names; what agents expect where nothing else is said.
const CONTROLLER: &str = "segue-migration-controller";
/// Where the controller finds its own, on central.
pub(crate) const OF_CONTROLLER: &str = "/etc/segue/agents-tls";
/// Where a node's agent finds its own, as the manifest has it.
const OF_AGENT: &str = "/etc/segue/tls";

/// An authority that forgets its key with this.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// Issues the controller's certificate and one for every node, by an authority that issues no other, and puts each where
/// it belongs.
pub(crate) fn issue(lab: &Lab) -> Result<()> {
    let authority = Authority::new()?;
    let controller = lab.central().path(OF_CONTROLLER);
    authority.issue_to(&controller, CONTROLLER, ExtendedKeyUsagePurpose::ServerAuth)?;
    for node in lab.nodes() {
        let name = format!("{}.node.segue.io", node.name());
        let agent = node.path(OF_AGENT);
        authority.issue_to(&agent, &name, ExtendedKeyUsagePurpose::ClientAuth)?;
    }
    Ok(())
}

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new()).context("an authority")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, "agents of the lab");
        let key = KeyPair::generate().context("an authority's key")?;
        let issuer = CertifiedIssuer::self_signed(params, key).context("an authority")?;
        Ok(Self(issuer))
    }

    fn issue_to(&self, dir: &Path, name: &str, purpose: ExtendedKeyUsagePurpose) -> Result<()> {
        let what = || format!("certificate of {name}");
        let mut params = CertificateParams::new(vec![name.to_owned()]).with_context(what)?;
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().with_context(what)?;
        let certificate = params.signed_by(&key, &self.0).with_context(what)?;
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        for (file, text, mode) in [
            ("tls.crt", certificate.pem(), 0o644),
            ("tls.key", key.serialize_pem(), 0o600),
            ("ca.crt", self.0.pem(), 0o644),
        ] {
            let path = dir.join(file);
            fs::write(&path, text)
                .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
                .with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new().unwrap();
        let purpose = ExtendedKeyUsagePurpose::ClientAuth;
        let issued = authority.issue_to(dir.path(), "node1.node.segue.io", purpose);
        issued.unwrap();
        let key = fs::metadata(dir.path().join("tls.key")).unwrap();
        assert_eq!(key.permissions().mode() & 0o777, 0o600);
        let authority = fs::read_to_string(dir.path().join("ca.crt")).unwrap();
        assert!(authority.starts_with("-----BEGIN CERTIFICATE-----"));
    }
}
