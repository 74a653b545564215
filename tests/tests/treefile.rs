//! `oscontainer-builder flatten`: the same as rpm-ostree on the cases of
//! tests/treefiles, and better where a treefile is wrong.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use e2e::{Done, builder, fails, ok, run, source_dir, tool};
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
        ("add-files: [[a, /usr/local/]]", "is not below /usr"),
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
        ("initramfs: {args: [a]}", "initramfs: \"regenerate\" is missing"),
        ("ex-override-replace: [{from: {repo: a}}]", "\"packages\" is missing"),
        ("releasever: 3\nconditional-include: [{if: releasever == \"3\", include: x}]", "compared with a string"),
        ("conditional-include: [{if: basearch < \"y\", include: x}]", "only == and != apply"),
        ("conditional-include: [{if: basearch != \"\", include: {include: x}}]", "use a file"),
        ("<<: {ref: r}", "merge keys are not part of the language"),
        ("- ref", "expected a mapping of fields, found a list"),
        ("ref: !secret r", "1:6: "),
        ("a: 1\n---\nb: 2", "more than one document"),
        ("ref: \u{7}", "control characters are not allowed"),
        ("metadata: {1: x}", "expected a string as key"),
        ("metadata: {a: {true: x}}", "expected a string as key"),
        ("variables: {1: x}", "expected a string as key"),
        ("1: x", "unknown field \"1\""),
        ("ex-override-replace: [{from: {repo: a, x: y}, packages: [b]}]", "\"repo\" and nothing else"),
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
    // An edition has defaults, and no more.
    let kept = "edition: \"2024\"\ntmp-is-dir: false\nboot-location: kernel-install\n";
    let expected = json!({
        "packages": [], "edition": "2024", "basearch": "x86_64", "boot-location": "kernel-install", "tmp-is-dir": false
    });
    assert_eq!(flattened(kept), expected);
    // Another machine's condition may name that machine.
    let other = "conditional-include: [{if: basearch == \"s390x\", include: {basearch: s390x, repos: [a]}}]\n";
    assert_eq!(flattened(other), json!({"packages": [], "basearch": "x86_64"}));
    // Nothing follows from what a condition includes in place, nor does `platform-module` of another file count.
    let host = "include: base.yaml\nconditional-include:\n- if: basearch == \"x86_64\"\n  include: {container: true}\n";
    let dir = directory(&[("host.yaml", host), ("base.yaml", "platform-module: platform:el8\ncontainer: false\n")]);
    let expected = json!({"packages": [], "basearch": "x86_64", "container": true});
    assert_eq!(ok(&mut flatten(dir.path(), "host.yaml")).json(), expected);
    // A condition's fields come as they are written.
    let text = "conditional-include:\n- if: basearch == \"x86_64\"\n  include: {packages: [a b], postprocess: [one]}\n\
                - if: basearch == \"arm\"\n  include: nowhere.yaml\npostprocess: [two]\n";
    assert_eq!(flattened(text), json!({"packages": ["a b"], "basearch": "x86_64", "postprocess": ["one", "two"]}));
}

#[test]
fn the_client_s_fields_are_read_too() {
    let host = "include: base.yaml\noverride-remove: [a]\npackages-local: {a: \"1\"}\ncustom: {url: u}\n\
                initramfs: {regenerate: true, args: [-v]}\nex-override-replace:\n- from: {repo: r}\n  packages: [a b]\n";
    let base = "override-remove: [b]\npackages-local: {a: \"2\", b: \"3\"}\nbase-refspec: x\ncustom: {url: v}\n\
                ex-override-replace: [{from: {repo: s}, packages: [a, c]}]\n";
    let dir = directory(&[("host.yaml", host), ("base.yaml", base)]);
    let expected = json!({
        "packages": [], "basearch": "x86_64", "override-remove": ["a", "b"], "packages-local": {"a": "1", "b": "3"},
        "custom": {"url": "u"}, "initramfs": {"regenerate": true, "args": ["-v"]}, "base-refspec": "x",
        "ex-override-replace": [
            {"from": {"repo": "s"}, "packages": ["c"]}, {"from": {"repo": "r"}, "packages": ["a", "b"]}
        ]
    });
    assert_eq!(ok(&mut flatten(dir.path(), "host.yaml")).json(), expected);
}

#[test]
fn null_fields_and_comments_count_as_absent() {
    assert_eq!(flattened("# nothing yet\n"), json!({"packages": [], "basearch": "x86_64"}));
    assert_eq!(flattened("packages:\n# - bash\nrepos: ~\ninclude:\nbootstrap-packages:\n"), flattened(""));
}

/// rpm-ostree's types read `packages`, `repo-packages` and `cliwrap-binaries` from YAML directly,
/// where a scalar is a string however it looks; all else through a copy of the plain values.
#[test]
fn names_of_packages_are_taken_as_they_are_written() {
    let text = "packages: [7zip, 389, true, 1.10, 0x10]\nrepo-packages: [{repo: 7, packages: [1.0, ~]}]\n\
                cliwrap-binaries: [~]\n";
    let expected = json!({
        "packages": ["0x10", "1.10", "389", "7zip", "true"], "basearch": "x86_64",
        "repo-packages": [{"repo": "7", "packages": ["1.0", "~"]}], "cliwrap-binaries": ["~"]
    });
    assert_eq!(flattened(text), expected);
    assert_eq!(flattened("packages:\n- a\n-\n- b\n")["packages"], json!(["a", "b"]));
    let done = refused("packages: [1.10, [a], {b: c}]", "host.yaml:1:18: packages[1]: expected a string, found a list");
    assert!(!done.stderr.contains("packages[0]"), "{}", done.stderr);
    for text in [
        "bootstrap-packages: [7]",
        "ignore-removed-users: [7]",
        "override-remove: [7]",
        "repos: [7]",
        "packages-x86_64: [7]",
        "conditional-include: [{if: basearch != \"\", include: {packages: [7]}}]",
    ] {
        refused(text, "expected a string (quote it), found the number 7");
    }
    let dir = directory(&[("host.json", "{\"packages\": [7]}")]);
    fails(&mut flatten(dir.path(), "host.json"), 3, "packages[0]: expected a string (quote it), found the number 7");
}

/// What rpm-ostree keeps as a mapping takes the last of two; what becomes a field is an error.
#[test]
fn a_key_given_twice_is_an_error_or_the_last_counts() {
    let text = "packages-x86_64: [a]\npackages-x86_64: [b]\nvariables: {v: 1, v: 2}\nref: \"${v}\"\n\
                metadata: {m: {n: 1, n: 2}, o: 3, o: 4}\narch-include: {arm: [x], arm: [y]}\n\
                check-groups: {type: data, entries: {g: 1, g: 2}}\n\
                conditional-include: [{if: basearch != \"\", include: {add-commit-metadata: {k: 1, k: 2}}}]\n";
    let dir = directory(&[("host.yaml", text)]);
    let done = ok(&mut flatten(dir.path(), "host.yaml"));
    let expected = json!({
        "packages": ["b"], "ref": "2", "basearch": "x86_64", "metadata": {"m": {"n": 2}, "o": 4},
        "check-groups": {"type": "data", "entries": {"g": 2}}, "add-commit-metadata": {"k": 2}
    });
    assert_eq!(done.json(), expected);
    assert!(done.stderr.contains("host.yaml: \"packages-x86_64\" is given twice: the last counts"), "{}", done.stderr);
    for text in [
        "default_target: a\ndefault_target: b",
        "bootstrap-packages: [a]\nbootstrap-packages: [b]",
        "rojig: {name: a, summary: b, license: c, name: d}",
        "check-groups: {type: data, type: data, entries: {}}",
        "conditional-include: [{if: n == 1, if: n == 2, include: x}]",
        "conditional-include: [{if: n == 1, include: {repos: [a], repos: [b]}}]",
    ] {
        refused(text, "is given twice");
    }
    let json = "{\"c\": 1, \"c\": 2, \"packages-x86_64\": [\"a\"], \"packages-x86_64\": [\"b\"], \"variables\": {\"v\": 1, \"v\": 2}}";
    let dir = directory(&[("host.json", json), ("old.json", "{\"gpg_key\": \"a\", \"gpg_key\": \"b\"}")]);
    let expected = json!({"packages": ["b"], "basearch": "x86_64", "c": 2});
    assert_eq!(ok(&mut flatten(dir.path(), "host.json")).json(), expected);
    fails(&mut flatten(dir.path(), "old.json"), 3, "\"gpg_key\" is given twice");
}

/// An old name of nothing is not given; one beside what `container` or `edition` sets is, in
/// rpm-ostree, given twice.
#[test]
fn old_names_count_where_they_are_given() {
    assert_eq!(flattened("default_target: ~\ndefault-target: b\n")["default-target"], "b");
    let dir = directory(&[("host.json", "{\"gpg_key\": \"a\", \"gpg-key\": null}")]);
    assert_eq!(ok(&mut flatten(dir.path(), "host.json")).json()["gpg-key"], "a");
    refused("container: true\nboot_location: new", "host.yaml:2:1: \"boot_location\" is the old name of");
    refused("edition: \"2024\"\nboot_location: modules", "host.yaml:2:1: \"boot_location\" is the old name of");
    assert_eq!(flattened("container: true\nboot-location: new\n")["boot-location"], "modules");
}

/// rpm-ostree looks for neither in a condition's fields, and so they do nothing.
#[test]
fn what_has_no_effect_in_a_condition_is_told() {
    let text = "conditional-include:\n- if: basearch == \"x86_64\"\n  include:\n    packages: [a]\n\
                \u{20}   packages-x86_64: [b]\n    packages-arm:\n    default_target: t\n";
    let dir = directory(&[("host.yaml", text)]);
    let done = ok(&mut flatten(dir.path(), "host.yaml"));
    assert_eq!(done.json(), json!({"packages": ["a"], "basearch": "x86_64"}));
    for name in ["packages-x86_64", "packages-arm", "default_target"] {
        assert!(done.stderr.contains(&format!("{name:?} has no effect here")), "{}", done.stderr);
    }
}

/// rpm-ostree substitutes only where a `${` comes before the first `}`, and never takes
/// `$`, `{` or `}` in a variable, of which `releasever` is one.
#[test]
fn signs_of_substitution_stay_or_are_refused() {
    assert_eq!(flattened("ref: \"} ${basearch}\"\n")["ref"], "} ${basearch}");
    assert_eq!(flattened("ref: \"${basearch}} ${basearch}\"\n")["ref"], "x86_64} x86_64");
    refused("releasever: \"{{ version }}\"", "host.yaml:1: releasever: \"{{ version }}\" cannot have '{' in it");
    let dir = directory(&[("host.yaml", "releasever: \"${RELEASE}\"\n")]);
    assert_eq!(ok(flatten(dir.path(), "host.yaml").args(["--releasever", "42"])).json()["releasever"], "42");
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
        ("ks/a.ks", "# comment\n  # another\n%packages\nnushell\n-bash\n\n%end\n%include sub/b.ks\n"),
        ("ks/sub/b.ks", "%packages --exclude-weakdeps\nsystemd\n%end\n"),
        ("bad.ks", "%packages\nbash\n"),
        ("other.ks", "\nlang en_US\n"),
        ("out.ks", "%include ../x.ks\n"),
        ("loop.ks", "%include loop.ks\n"),
        // Two may share a third: each is read by itself.
        ("two.yaml", "include: [one.ks, two.ks]\n"),
        ("one.ks", "%packages\nx\n%end\n%include common.ks\n"),
        ("two.ks", "%packages\ny\n%end\n%include common.ks\n"),
        ("common.ks", "%packages\nz\n%end\n"),
    ]);
    let expected = json!({
        "packages": ["nushell", "systemd"], "basearch": "x86_64", "exclude-packages": ["bash", "x"],
        "recommends": false
    });
    assert_eq!(ok(&mut flatten(dir.path(), "host.yaml")).json(), expected);
    assert_eq!(ok(&mut flatten(dir.path(), "two.yaml")).json()["packages"], json!(["x", "y", "z"]));
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

/// `flatten NAME` in `dir` must fail with `reason` in a second of processor time and
/// 256 MiB of address space.
#[track_caller]
fn refused_cheaply(dir: &Path, name: &str, reason: &str) {
    let mut command = tool("prlimit");
    command.args(["--as=268435456", "--cpu=1"]).arg(builder().get_program());
    command.current_dir(dir).args(["flatten", name, "--arch", "x86_64"]);
    fails(&mut command, 3, reason);
}

#[test]
fn hostile_treefiles_cost_little() {
    let levels: String = (1..60).map(|n| format!("  a{n}: &a{n} [*a{0}, *a{0}]\n", n - 1)).collect();
    let doubling = format!("metadata:\n  x: &a0 [lol]\n{levels}");
    let wide = format!("metadata:\n  x: &x [{}]\n  y: [{}]\n", "a, ".repeat(30_000), "*x, ".repeat(10_000));
    let flow = format!("metadata: {}", "[".repeat(500_000));
    let block = format!("metadata:\n {}", "- ".repeat(400_000));
    let large = format!("# {}\n", "x".repeat(1 << 20));
    let mistakes = format!("repos:\n{}", "- [1]\n".repeat(30_000));
    let unknown: String = (0..60_000).map(|n| format!("k{n}: 1\n")).collect();
    let numbers = format!("packages:\n{}- [a]\n", "- 1\n".repeat(250_000));
    for (text, reason) in [
        (&doubling, "repetition limit"),
        (&wide, "aliases expand to over"),
        (&flow, "nest deeper"),
        (&block, "recursion limit"),
        (&mistakes, "and 29999 more"),
        (&unknown, "and 59999 more"),
        (&numbers, "packages[250000]: expected a string, found a list"),
        (&large, "a treefile may have 1048576 bytes"),
    ] {
        refused_cheaply(directory(&[("host.yaml", text)]).path(), "host.yaml", reason);
    }
    let chain: Vec<_> = (0..60).map(|n| (format!("{n}.yaml"), format!("include: {}.yaml", n + 1))).collect();
    let chain: Vec<_> = chain.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    refused_cheaply(directory(&chain).path(), "0.yaml", "includes go deeper than 50 files");
    let circle = directory(&[("a.yaml", "include: b.yaml"), ("b.yaml", "include: c.ks"), ("c.ks", "%include a.yaml")]);
    refused_cheaply(circle.path(), "a.yaml", "a.yaml:1: expected %packages or %include");
    // 100 MB, as a treefile and as an included one.
    let huge = directory(&[("a.yaml", "include: huge.yaml"), ("huge.yaml", "")]);
    fs::File::options()
        .write(true)
        .open(huge.path().join("huge.yaml"))
        .and_then(|f| f.set_len(100_000_000))
        .expect("a large file");
    for name in ["a.yaml", "huge.yaml"] {
        refused_cheaply(huge.path(), name, "this has 100000000");
    }
}

/// The next number of a fixed sequence (xorshift64, Marsaglia 2003).
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state >> 16).expect("48 bits")
}

/// A small version of `make fuzz`: the same damage to the oracle's treefiles in every run.
#[test]
fn damaged_treefiles_end_in_a_treefile_or_one_error() {
    let mut cases: Vec<_> = fs::read_dir(source_dir().join("tests/treefiles"))
        .expect("the cases are there")
        .filter_map(|entry| fs::read(entry.expect("an entry").path().join("host.yaml")).ok())
        .collect();
    cases.sort();
    let state = &mut 0x9e37_79b9_7f4a_7c15;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut fine, mut wrong) = (0, 0);
    for _ in 0..600 {
        let mut text = cases[next(state) % cases.len()].clone();
        for _ in 0..=next(state) % 4 {
            let at = next(state) % (text.len() + 1);
            let other = &cases[next(state) % cases.len()];
            match next(state) % 4 {
                0 => text.truncate(at),
                1 => text.splice(at..at, other.iter().copied()).for_each(drop),
                2 => text.insert(at, b"[]{}:-&*!|>'\"%@`#,?\n\t \0\xff$"[next(state) % 25]),
                _ => drop((at < text.len()).then(|| text.remove(at))),
            }
        }
        fs::write(dir.path().join("host.yaml"), &text).expect("a treefile");
        let done = run(&mut flatten(dir.path(), "host.yaml"));
        let shown = || format!("{done:?}\n{}", String::from_utf8_lossy(&text));
        match done.code {
            0 => {
                let warns = |line: &str| line.starts_with("WARN ");
                assert!(done.json().is_object() && done.stderr.lines().all(warns), "{}", shown());
                fine += 1;
            }
            3 => {
                assert!(done.stdout.is_empty() && done.stderr.lines().count() == 1, "{}", shown());
                wrong += 1;
            }
            _ => panic!("{}", shown()),
        }
    }
    assert!(fine > 50 && wrong > 50, "{fine} fine and {wrong} wrong");
}

/// The schema that the program prints.
fn schema() -> Value {
    ok(builder().arg("schema")).json()
}

#[test]
fn the_schema_takes_what_flatten_takes() {
    let validator = jsonschema::validator_for(&schema()).expect("the schema is one");
    let parsed = |text: &str| serde_yaml::from_str::<Value>(text).expect("YAML");
    let mut count = 0;
    for entry in fs::read_dir(source_dir().join("tests/treefiles")).expect("the cases are there") {
        let case = entry.expect("an entry").path();
        let yaml = case.join("host.yaml");
        if !yaml.exists() || run(&mut flatten(&case, "host.yaml")).code != 0 {
            continue;
        }
        let files = fs::read_dir(&case).expect("a case").map(|entry| entry.expect("an entry").path());
        for file in files.filter(|file| file.extension().is_some_and(|extension| extension == "yaml")) {
            let value = parsed(&fs::read_to_string(&file).expect("a treefile"));
            let errors: Vec<_> = validator.iter_errors(&value).map(|e| format!("{}: {e}", e.instance_path())).collect();
            assert!(errors.is_empty(), "{}: {errors:#?}", file.display());
            count += 1;
        }
    }
    assert!(count >= 50, "only {count} treefiles were found");
    for text in [
        "packges: [a]",
        "selinux: maybe",
        "ref: 1",
        "repos: x",
        "repos: [1]",
        "boot-location: newer",
        "edition: 2024",
        "add-files: [[a]]",
        "check-passwd: {type: fil}",
        "check-passwd: {type: file}",
        "check-groups: {type: data, entries: {a: [1, 2]}}",
        "check-passwd: {type: data, entries: {a: [1, 2, 3]}}",
        "rojig: {name: x}",
        "repo-packages: [{repo: x}]",
        "automatic-version-suffix: ab",
        "selinux-label-version: 2",
        "remove-from-packages: [[]]",
        "packages-x86_64: true",
        "packages-x86_64: [1]",
        "variables: {n: -1}",
        "override-remove: a",
        "initramfs: {args: [a]}",
        "include: {a: b}",
        "conditional-include: [{if: n = 1, include: x}]",
        "conditional-include: [{if: n == 1, include: {include: x}}]",
        "conditional-include: [{if: n == 1}]",
        "- ref",
    ] {
        assert!(!validator.is_valid(&parsed(text)), "the schema takes {text}");
        refused(text, "host.yaml:1:");
    }
}

#[test]
fn the_documentation_has_the_table_of_fields() {
    let schema = schema();
    let fields = schema["properties"].as_object().expect("properties");
    let documentation = fs::read_to_string(source_dir().join("docs/treefile.md")).expect("docs/treefile.md");
    let rows: Vec<Vec<&str>> = documentation
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches(['|', ' ']).split(" | ").collect())
        .collect();
    let mut missing = Vec::new();
    for (name, field) in fields {
        // Includes have a row of their own, old names none.
        let description = field["description"].as_str().expect("a description");
        let parts: Vec<&str> = description.split("\n\n").collect();
        let [meaning, merging, by_dnf] = parts.as_slice() else { continue };
        let merging = merging.strip_prefix("Merging of includes: ").and_then(|text| text.strip_suffix('.'));
        let by_dnf = by_dnf.strip_prefix("The dnf engine: ").and_then(|text| text.strip_suffix('.'));
        let expected = [*meaning, merging.expect("how it merges"), by_dnf.expect("what dnf does")];
        let name = format!("`{name}`");
        let found = rows.iter().find(|row| row[0] == name && row.len() == 5 && row[2..] == expected);
        if found.is_none() {
            missing.push(format!("| {name} | … | {} |", expected.join(" | ")));
        }
    }
    assert!(missing.is_empty(), "these rows are not in docs/treefile.md:\n{}", missing.join("\n"));
    assert!(fields.len() > 65 && rows.len() == fields.len() - 6, "{} fields, {} rows", fields.len(), rows.len());
}
