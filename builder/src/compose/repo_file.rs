//! `.repo` files (dnf.conf(5)): what they say, and the copies of them that dnf gets.

/// A section of a `.repo` file: a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// The repository's id.
    pub id: String,
    /// Keys and values; one that goes on in more lines has these.
    options: Vec<(String, String)>,
}

/// The sections of a `.repo` file, as libdnf reads it (libdnf/utils/iniparser/iniparser.cpp): comments only on
/// lines of their own, values that go on in indented lines.
///
/// # Errors
/// What is wrong with which line.
pub fn parse(text: &str) -> Result<Vec<Section>, String> {
    let mut sections: Vec<Section> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let wrong = |what: &str| format!("line {}: {what}", index + 1);
        let trimmed = line.trim();
        if trimmed.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(id) = trimmed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            sections.push(Section { id: id.to_owned(), options: Vec::new() });
            continue;
        }
        let options = match sections.last_mut() {
            Some(section) => &mut section.options,
            None => return Err(wrong("no [section] is before it")),
        };
        match (line.starts_with(char::is_whitespace), options.last_mut(), line.split_once('=')) {
            (true, Some((_, value)), _) => value.extend(["\n", trimmed]),
            (false, _, Some((key, value))) => options.push((key.trim().to_owned(), value.trim().to_owned())),
            _ => return Err(wrong("neither a [section] nor KEY=VALUE")),
        }
    }
    Ok(sections)
}

impl Section {
    /// Whether dnf uses it where nobody says which ones to use.
    pub fn is_enabled(&self) -> bool {
        let said = self.options.iter().rfind(|(key, _)| key == "enabled");
        said.is_none_or(|(_, value)| !["0", "no", "false", "off"].contains(&value.to_ascii_lowercase().as_str()))
    }

    /// Keys, and the words of their values.
    pub fn words(&self) -> impl Iterator<Item = (&str, &str)> {
        self.options.iter().flat_map(|(key, value)| {
            let words = value.split([',', ' ', '\t', '\n']).filter(|word| !word.is_empty());
            words.map(|word| (key.as_str(), word))
        })
    }

    /// Leaves out packages, besides those that it leaves out already.
    pub fn exclude(&mut self, packages: &str) {
        // dnf has two names for it.
        let mut there = self.options.iter_mut().filter(|(key, _)| key == "excludepkgs" || key == "exclude").peekable();
        if there.peek().is_some() {
            there.for_each(|(_, value)| value.extend([",", packages]));
        } else {
            self.options.push(("excludepkgs".to_owned(), packages.to_owned()));
        }
    }

    /// Its text in a `.repo` file, with the options whose key `keep` takes.
    pub fn text(&self, keep: impl Fn(&str) -> bool) -> String {
        let options = self.options.iter().filter(|(key, _)| keep(key));
        let lines = options.map(|(key, value)| format!("{key}={}\n", value.replace('\n', "\n ")));
        format!("[{}]\n{}", self.id, lines.collect::<String>())
    }
}

/// Whether an option is only for the network; among these are all that are secret.
pub fn is_for_network(key: &str) -> bool {
    ["username", "password"].contains(&key) || ["proxy", "ssl"].iter().any(|prefix| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::{is_for_network, parse};

    #[test]
    fn sections_are_read_and_written() {
        let text = "# all\n[one]\nname = One\nbaseurl=file:///a\n  file:///b,file:///c\n;no\npassword=x\n y\n\n[two]\nenabled=False\nexclude=p\n";
        let mut sections = parse(text).unwrap();
        assert_eq!(sections.iter().map(|section| section.is_enabled()).collect::<Vec<_>>(), [true, false]);
        let words: Vec<_> = sections[0].words().filter(|(key, _)| *key == "baseurl").map(|(_, word)| word).collect();
        assert_eq!(words, ["file:///a", "file:///b", "file:///c"]);
        sections.iter_mut().for_each(|section| section.exclude("q,r"));
        let written: String = sections.iter().map(|section| section.text(|key| !is_for_network(key))).collect();
        let expected = "[one]\nname=One\nbaseurl=file:///a\n file:///b,file:///c\nexcludepkgs=q,r\n\
                        [two]\nenabled=False\nexclude=p,q,r\n";
        assert_eq!(written, expected);
        assert_eq!(parse(&written).unwrap()[1], sections[1]);
    }

    #[test]
    fn what_dnf_cannot_read_is_told_with_its_line() {
        for (text, wrong) in
            [("a=b\n", "line 1: no [section]"), ("[a]\n\nb\n", "line 3: neither"), ("[a]\n b=c\n", "line 2")]
        {
            assert!(parse(text).unwrap_err().starts_with(wrong), "{text:?}");
        }
    }
}
