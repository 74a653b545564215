//! `oscontainer-builder flatten`: the same as rpm-ostree on the cases of
//! tests/treefiles, and better where a treefile is wrong.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::{Done, builder, fails, ok, run, source_dir};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A directory with these files.
fn directory(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().expect("files lie in the directory")).expect("a subdirectory");
        fs::write(path, text).expect("a file of the case");
    }
    dir
}

/// `flatten NAME` in `dir`, on x86_64 wherever the test runs.
fn flatten(dir: &Path, name: &str) -> Command {
    let mut command = builder();
    command.current_dir(dir).args(["flatten", name, "--arch", "x86_64"]);
    command
}

/// What `flatten` makes of one treefile.
#[track_caller]
fn flattened(text: &str) -> Value {
    ok(&mut flatten(directory(&[("host.yaml", text)]).path(), "host.yaml")).json()
}

/// The error of `flatten` on one treefile, which must have `reason` in it.
#[track_caller]
fn refused(text: &str, reason: &str) -> Done {
    fails(&mut flatten(directory(&[("host.yaml", text)]).path(), "host.yaml"), 3, reason)
}

#[test]
fn every_case_comes_out_as_rpm_ostree_prints_it() {
    let cases = source_dir().join("tests/treefiles");
    let mut count = 0;
    for entry in fs::read_dir(&cases).expect("the cases are there") {
        let case = entry.expect("an entry").path();
        let Ok(expected) = fs::read_to_string(case.join("expected.json")) else { continue };
        let expected: Value = serde_json::from_str(&expected).expect("expected.json is JSON");
        let name = expected["treefile"].as_str().expect("the case names its treefile");
        let done = run(&mut flatten(&case, name));
        if expected["exit"] == 0 {
            assert!(done.code == 0, "{}: {done:?}", case.display());
            assert_eq!(done.json(), expected["stdout"], "{}", case.display());
        } else {
            assert!(done.code == 3 && done.stdout.is_empty(), "{}: {done:?}", case.display());
            assert_eq!(done.stderr.lines().count(), 1, "{}: {done:?}", case.display());
        }
        count += 1;
    }
    assert!(count >= 57, "only {count} cases were found");
}

#[test]
fn the_output_is_indented_by_two_spaces_in_the_order_of_the_fields() {
    let case = source_dir().join("tests/treefiles/no-packages");
    let done = ok(&mut flatten(&case, "host.yaml"));
    assert!(done.stdout.starts_with("{\n  \"packages\": [],\n  \"ref\": \"r\",\n"), "{}", done.stdout);
    assert!(done.stdout.ends_with("\n}\n"), "{}", done.stdout);
}

#[test]
fn architecture_and_release_can_be_chosen() {
    let host = "ref: os/${releasever}/${basearch}\nreleasever: 40\npackages-aarch64: [uboot]\n\
                packages-x86_64: [grub]\ninclude: base.yaml\n";
    let base = "conditional-include:\n- if: releasever == \"42\"\n  include: {packages: [new]}\n";
    let dir = directory(&[("host.yaml", host), ("base.yaml", base)]);
    let mut command = builder();
    command.args(["flatten", "--arch", "aarch64", "--releasever", "42"]).arg(dir.path().join("host.yaml"));
    let expected = json!({
        "packages": ["new", "uboot"], "ref": "os/42/aarch64", "basearch": "aarch64", "releasever": "42"
    });
    assert_eq!(ok(&mut command).json(), expected);
    refused("basearch: s390x\n", "host.yaml:1:11: basearch: this treefile is for s390x");
}

#[test]
fn all_mistakes_of_a_file_are_told_with_their_places() {
    let done = refused(
        "ref: r\npackges: [a]\nrepos: [b, [c]]\nselinux: maybe\nboot-location: newer\nadd-files:\n- [x]\n\
         check-passwd: {type: fil}\nvariables: {releasever: 1, n: -1}\nconditional-include:\n- if: [n = 1]\n  include: x\n\
         rojig: {name: x}\n",
        "host.yaml:2:1: unknown field \"packges\" (did you mean \"packages\"?); ",
    );
    for part in [
        "host.yaml:3:12: repos[1]: expected a string, found a list",
        "host.yaml:4:10: selinux: expected true or false, found the string \"maybe\"",
        "host.yaml:5:16: boot-location: expected one of \"new\", \"modules\", \"kernel-install\"",
        "host.yaml:7:3: add-files[0]: expected a list of two strings",
        "host.yaml:8:22: check-passwd.type: expected one of \"none\", \"previous\", \"file\", \"data\" (did you mean \"file\"?)",
        "host.yaml:9:31: variables.n: expected",
        "host.yaml:11:8: conditional-include[0].if[0]: expected one of ==, !=, <, <=, >, >= after \"n\"",
        "host.yaml:13:8: rojig: \"summary\" is missing",
        "host.yaml:13:8: rojig: \"license\" is missing",
    ] {
        assert!(done.stderr.contains(part), "{part} is not in {}", done.stderr);
    }
}

#[test]
fn what_types_do_not_show_is_refused_too() {
    for (text, reason) in [
        ("add-files: [[a, /opt/a]]", "\"/opt/a\" is not below /usr"),
        ("add-files: [[a, /usr/../opt/a]]", "is not below /usr"),
        ("automatic-version-suffix: ab", "1:27: automatic-version-suffix: expected one ASCII character"),
        ("selinux-label-version: 2", "expected 0 or 1"),
        ("repovars: {basearch: x}", "1:12: repovars: \"basearch\" cannot be set here"),
        ("variables: {releasever: 1}", "\"releasever\" sets itself"),
        ("variables: {a: \"${b}\"}", "cannot have '$'"),
        ("packages: [\"'a b\"]", "a single quote is not closed"),
        ("packages-x86_64: [1]", "packages-x86_64[0]: expected a string"),
        ("packages-hal9000: true", "packages-hal9000: expected a list"),
        ("edition: 2024", "expected one of \"2014\", \"2024\""),
        ("remove-from-packages: [[]]", "remove-from-packages[0]: expected a package's name"),
        ("override-remove: [a]", "is for layering on a booted system"),
        ("releasever: 3\nconditional-include: [{if: releasever == \"3\", include: x}]", "compared with a string"),
        ("conditional-include: [{if: basearch < \"y\", include: x}]", "only == and != apply"),
        ("conditional-include: [{if: basearch != \"\", include: {include: x}}]", "use a file"),
        ("<<: {ref: r}", "merge keys are not part of the language"),
        ("- ref", "expected a mapping of fields, found a list"),
        ("ref: !secret r", "1:6: "),
        ("a: 1\n---\nb: 2", "more than one document"),
        ("ref: \u{7}", "control characters are not allowed"),
    ] {
        refused(text, reason);
    }
}

#[test]
fn what_a_field_implies_holds_before_includes() {
    let host = "include: base.yaml\ntmp-is-dir: false\ncontainer: true\n";
    let dir = directory(&[("host.yaml", host), ("base.yaml", "edition: \"2024\"\npackages: [b]\n")]);
    let implied = json!({
        "packages": ["b"], "edition": "2024", "basearch": "x86_64", "selinux": false, "container": true,
        "boot-location": "modules", "tmp-is-dir": true, "preserve-passwd": false,
        "check-passwd": {"type": "none"}, "check-groups": {"type": "none"}
    });
    assert_eq!(ok(&mut flatten(dir.path(), "host.yaml")).json(), implied);
    // A condition's fields come as they are written.
    let text = "conditional-include:\n- if: basearch == \"x86_64\"\n  include: {packages: [a b], postprocess: [one]}\n\
                - if: basearch == \"arm\"\n  include: nowhere.yaml\npostprocess: [two]\n";
    assert_eq!(flattened(text), json!({"packages": ["a b"], "basearch": "x86_64", "postprocess": ["one", "two"]}));
}

#[test]
fn null_fields_and_comments_count_as_absent() {
    assert_eq!(flattened("# nothing yet\n"), json!({"packages": [], "basearch": "x86_64"}));
    assert_eq!(flattened("packages:\n# - bash\nrepos: ~\ninclude:\nbootstrap-packages:\n"), flattened(""));
    assert_eq!(flattened("packages: [7zip, 389, true]\n")["packages"], json!(["389", "7zip", "true"]));
}

#[test]
fn json_treefiles_may_have_comments_and_unknown_fields() {
    let text = r#"{"comment": "a", "ref": "os/${basearch}", "comment": "b", "osname": "os",
        "bootstrap_packages": ["filesystem"], "packages": ["a b"], "packages-x86_64": ["c"], "packages-s390x": ["d"]}"#;
    let dir = directory(&[("host.json", text), ("bad.json", "{\"ref\": \"a\",\n \"ref\": \"b\"}"), ("open.json", "{")]);
    let expected = json!({
        "packages": ["a", "b", "c"], "ref": "os/x86_64", "basearch": "x86_64", "comment": "b", "osname": "os",
        "bootstrap_packages": ["filesystem"]
    });
    assert_eq!(ok(&mut flatten(dir.path(), "host.json")).json(), expected);
    fails(&mut flatten(dir.path(), "bad.json"), 3, "bad.json:2:");
    fails(&mut flatten(dir.path(), "open.json"), 3, "open.json:1:1: EOF while parsing");
}

#[test]
fn kickstart_files_give_packages() {
    let dir = directory(&[
        ("host.yaml", "include: ks/a.ks\nexclude-packages: [x]\n"),
        ("ks/a.ks", "# comment\n%packages\nnushell\n-bash\n\n%end\n%include sub/b.ks\n"),
        ("ks/sub/b.ks", "%packages --exclude-weakdeps\nsystemd\n%end\n"),
        ("bad.ks", "%packages\nbash\n"),
        ("other.ks", "\nlang en_US\n"),
        ("out.ks", "%include ../x.ks\n"),
        ("loop.ks", "%include loop.ks\n"),
    ]);
    let expected = json!({
        "packages": ["nushell", "systemd"], "basearch": "x86_64", "exclude-packages": ["bash", "x"],
        "recommends": false
    });
    assert_eq!(ok(&mut flatten(dir.path(), "host.yaml")).json(), expected);
    fails(&mut flatten(dir.path(), "bad.ks"), 3, "bad.ks:1: %packages has no %end");
    fails(&mut flatten(dir.path(), "other.ks"), 3, "other.ks:2: expected %packages or %include");
    fails(&mut flatten(dir.path(), "out.ks"), 3, "must be a path below");
    fails(&mut flatten(dir.path(), "loop.ks"), 3, "included twice");
}

#[test]
fn files_beside_the_treefile_must_exist() {
    for (text, reason) in [
        ("add-files: [[gone, /usr/gone]]", "gone: the add-files of host.yaml does not exist"),
        ("check-passwd: {type: file, filename: gone}", "gone: the check-passwd of host.yaml"),
        ("check-groups: {type: file, filename: gone}", "gone: the check-groups of host.yaml"),
        ("arch-include: {x86_64: [gone.yaml]}", "including gone.yaml from host.yaml: ./gone.yaml: "),
        ("include: .", "the treefile is not a file"),
    ] {
        refused(text, reason);
    }
    let dir = directory(&[("host.yaml", "include: other.yaml"), ("finalize.d/10-x", "#!/bin/sh\n")]);
    let script = dir.path().join("finalize.d/10-x");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("a mode");
    fs::hard_link(dir.path().join("host.yaml"), dir.path().join("other.yaml")).expect("a link");
    fails(&mut flatten(dir.path(), "host.yaml"), 3, "included twice (as host.yaml)");
    fails(&mut flatten(dir.path(), "none.yaml"), 3, "none.yaml: the treefile does not exist");
}

#[test]
fn hostile_treefiles_end_soon() {
    let levels: String = (1..60).map(|n| format!("  a{n}: &a{n} [*a{0}, *a{0}]\n", n - 1)).collect();
    let doubling = format!("metadata:\n  x: &a0 [lol]\n{levels}");
    let wide = format!("metadata:\n  x: &x [{}]\n  y: [{}]\n", "a, ".repeat(30_000), "*x, ".repeat(10_000));
    let flow = format!("metadata: {}", "[".repeat(500_000));
    let block = format!("metadata:\n {}", "- ".repeat(400_000));
    let large = format!("# {}\n", "x".repeat(1 << 20));
    let mistakes = format!("repos:\n{}", "- [1]\n".repeat(30_000));
    for (text, reason) in [
        (&doubling, "repetition limit"),
        (&wide, "aliases expand to over"),
        (&flow, "nest deeper"),
        (&block, "recursion limit"),
        (&mistakes, "and 29999 more"),
        (&large, "a treefile may have 1048576 bytes"),
    ] {
        let start = Instant::now();
        refused(text, reason);
        assert!(start.elapsed() < Duration::from_secs(30), "{reason} took {:?}", start.elapsed());
    }
    let chain: Vec<_> = (0..60).map(|n| (format!("{n}.yaml"), format!("include: {}.yaml", n + 1))).collect();
    let chain: Vec<_> = chain.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    fails(&mut flatten(directory(&chain).path(), "0.yaml"), 3, "includes go deeper than 50 files");
}
