//! What is known of a commit, and the two documents that tell it: an SPDX list of the
//! packages (SPDX specification 2.3) and in-toto provenance (SLSA provenance 1.0). They lie
//! in the image and are attached to it in registries. The same commit out of the same
//! artifact gives the same bytes.

use anyhow::{Context, Result};
use oscontainer_artifact::digest::{Checksum, Digest};
use oscontainer_artifact::manifest;
use oscontainer_artifact::object::Package;
use oscontainer_program::{moment, reject};
use serde_json::{Value, json};

use super::document;
use crate::repo::{Origin, Repository};

/// The directory of the documents in the image.
pub const DIRECTORY: &str = "usr/share/oscontainer";
/// The SPDX document's file.
const SBOM: &str = "sbom.spdx.json";
/// The provenance's file.
const PROVENANCE: &str = "provenance.json";
/// The provenance's predicate.
pub const PREDICATE: &str = "https://slsa.dev/provenance/v1";
/// Who composed, and how (docs/image.md).
const BUILDER: &str = "urn:oscontainer:builder";
const BUILD_TYPE: &str = "urn:oscontainer:compose:1";

/// A ref's commit, as labels and documents tell it.
pub struct Commit {
    /// The ref.
    pub ref_name: String,
    /// The commit that it names.
    pub checksum: Checksum,
    /// The commit's time (RFC 3339).
    pub created: String,
    /// The commit's `version`, where it has one.
    pub version: Option<String>,
    /// The commit's subject; often empty.
    pub subject: String,
    /// The hash of what went into the compose, where the commit has one.
    input_hash: Option<String>,
    /// The RPMs in it.
    packages: Vec<Package>,
    /// The artifact that brought it, where `fetch` did.
    origin: Option<Origin>,
}

impl Commit {
    /// The commit `checksum` of `repo`, which `ref_name` names.
    ///
    /// # Errors
    /// Rejected when it is damaged or has an impossible time; else when it cannot be read.
    pub fn read(repo: &Repository, ref_name: String, checksum: Checksum) -> Result<Self> {
        let info = repo.commit(&checksum)?;
        let Some(created) = moment::utc(info.timestamp) else {
            reject!("commit {checksum} has the impossible timestamp {}", info.timestamp)
        };
        let mut packages = info.packages;
        packages.sort();
        packages.dedup();
        Ok(Self {
            ref_name,
            checksum,
            created,
            version: info.version,
            subject: info.subject,
            input_hash: info.input_hash,
            packages,
            origin: repo.origin()?.filter(|origin| origin.manifest.commit == checksum),
        })
    }

    /// The documents' file names, and what they say.
    ///
    /// # Errors
    /// None that can happen: all keys are strings.
    pub fn documents(&self) -> Result<[(&'static str, Vec<u8>); 2]> {
        let bytes = |document: &Value| document::bytes(document).context("describing the commit");
        Ok([(SBOM, bytes(&self.sbom())?), (PROVENANCE, bytes(&self.provenance(None))?)])
    }

    /// The packages, as an SPDX document.
    pub fn sbom(&self) -> Value {
        let host = "SPDXRef-Host";
        let mut packages = vec![json!({
            "SPDXID": host,
            "name": self.ref_name,
            "versionInfo": self.version.as_deref().unwrap_or("NOASSERTION"),
            "checksums": [{"algorithm": "SHA256", "checksumValue": self.checksum.to_string()}],
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": false,
            "primaryPackagePurpose": "OPERATING-SYSTEM",
        })];
        let mut relationships = vec![json!({
            "spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": host,
        })];
        for (number, package) in self.packages.iter().enumerate() {
            let id = format!("SPDXRef-RPM-{number}");
            packages.push(json!({
                "SPDXID": id,
                "name": package.name,
                "versionInfo": package.evr(),
                "downloadLocation": "NOASSERTION",
                "filesAnalyzed": false,
                "externalRefs": [{
                    "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl(package),
                }],
            }));
            relationships.push(json!({
                "spdxElementId": host, "relationshipType": "CONTAINS", "relatedSpdxElement": id,
            }));
        }
        json!({
            "spdxVersion": "SPDX-2.3",
            "SPDXID": "SPDXRef-DOCUMENT",
            "dataLicense": "CC0-1.0",
            "name": self.ref_name,
            "documentNamespace": format!("urn:oscontainer:sbom:{}", self.checksum),
            "creationInfo": {"created": self.created, "creators": [format!("Tool: {}", tool())]},
            "packages": packages,
            "relationships": relationships,
        })
    }

    /// Where the commit comes from, as an in-toto statement; of the `image` too, where it is about one.
    pub fn provenance(&self, image: Option<&Digest>) -> Value {
        let subject = |name: &str, digest: String| json!({"name": name, "digest": {"sha256": digest}});
        let mut subjects = Vec::new();
        subjects.extend(image.map(|image| subject("oscontainer", image.hex())));
        subjects.push(subject(&self.ref_name, self.checksum.to_string()));
        let mut versions = json!({});
        if let Some(Origin { digest, manifest }) = &self.origin {
            subjects.push(subject(manifest::FILE, digest.hex()));
            subjects.push(subject(&manifest.tarball.path, manifest.tarball.digest.hex()));
            if let Some(builder) = manifest.annotations.get(manifest::BUILDER) {
                versions["oscontainer-builder"] = builder.as_str().into();
            }
        }
        let input = self.input_hash.as_ref().map(|hash| {
            // rpm-ostree's hash was a SHA-256 and is a SHA-512 now.
            let algorithm = if hash.len() == 128 { "sha512" } else { "sha256" };
            json!({"name": "treefile", "digest": {algorithm: hash}})
        });
        json!({
            "_type": "https://in-toto.io/Statement/v1",
            "subject": subjects,
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {"ref": self.ref_name, "version": self.version},
                    "resolvedDependencies": Vec::from_iter(input),
                },
                "runDetails": {"builder": {"id": BUILDER, "version": versions}},
            },
        })
    }
}

/// The package as a package URL (purl specification, type `rpm`). Its vendor is not known here.
fn purl(package: &Package) -> String {
    let encode = |text: &str| percent_encoding::utf8_percent_encode(text, PURL).to_string();
    let epoch =
        if matches!(package.epoch.as_str(), "" | "0") { String::new() } else { format!("&epoch={}", package.epoch) };
    let (name, version) = (encode(&package.name), encode(&format!("{}-{}", package.version, package.release)));
    format!("pkg:rpm/{name}@{version}?arch={}{epoch}", encode(&package.architecture))
}

/// What a purl's parts have to encode.
const PURL: &percent_encoding::AsciiSet =
    &percent_encoding::NON_ALPHANUMERIC.remove(b'.').remove(b'-').remove(b'_').remove(b'~');

/// This program, as SPDX names tools.
fn tool() -> String {
    concat!("oscontainer-aggregator-", env!("CARGO_PKG_VERSION")).to_owned()
}
